"""Read the labels back from the gradient that goes up (A4): it is linear in them.

With f the top's layers and norm, W the head and P = softmax(f(z) W'), the gradient of the mean
cross-entropy is G = J' e with J the derivative of f at z and e = (P - Y) W / N. The server knows
z exactly and the public weights, so it knows J, P and W: it solves for e, and at each position
looks which row of W fits. Neither N nor the positions that carry a label need be known: e is zero
where there is none, and one scalar is fitted. Whoever has found the labels can prove it, for they
must give G again.
"""

# Shapes:  B batch   T tokens   D model width   V vocabulary, or classes
#          E directions of the error signal: D, or V where there are few labels

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.audit.codebook import TINY, Codebook, Prior
from cutlayer.audit.derivative import Derivative, descend, metric_of
from cutlayer.audit.finding import Finding, Recovered
from cutlayer.audit.metrics import finding_of
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError
from cutlayer.privacy.transcript import Departure

__all__ = ["Inverted", "invert_labels", "label_inversion"]

NO_LABEL = -100

# Rows are solved together up to this many positions: memory grows with them, speed hardly does.
_POSITIONS_TOGETHER = 512
_ROUNDING = 1e-5
# What labels may leave unexplained to be taken for known and subtracted.
_MOSTLY = 0.1
# What the rounding of a 16-bit codec may leave unexplained of right labels.
_PROVEN = 0.02


@dataclass(frozen=True)
class Inverted:
    """The labels that a gradient carries.

    Attributes:
        labels_BT: The label that each position carries (of a language model: the token after it),
            -100 where there is none; of a classifier one class a row, (B,).
        likely_BT: The label that the model itself finds likeliest there, without the gradient.
        residual: What part of the gradient these labels, sent through the model, leave unexplained,
            as a ratio of norms over the whole batch. Near 0 it proves that they are right.
        residual_B: The same of each row.
        iterations: How many conjugate-gradient iterations were done at most.
        scale: The factor before each position's gradient; 1/N for a mean over N labels.
    """

    labels_BT: Tensor
    likely_BT: Tensor
    residual: float
    residual_B: Tensor
    iterations: int
    scale: float


class _Inversion:
    """One piece of a batch on its way: what was solved for, and the best labels so far."""

    def __init__(
        self,
        public: PublicModel,
        trunk_out_BTD: Tensor,
        grad_BTD: Tensor,
        labelled_BT: Tensor | None,
        carried: dict[str, Tensor],
    ) -> None:
        # With fewer labels than directions, the logits are the smaller space to solve in.
        few = public.head_VD.shape[0] <= public.head_VD.shape[1]

        def value_of(point_BTD: Tensor) -> Tensor:
            value = public.top(point_BTD, **carried)
            value = public.head(value) if few else value
            return value if value.dim() == 3 else value.unsqueeze(1)

        self._grad_BTD = grad_BTD
        self._labelled_BT = labelled_BT
        # Nothing comes from here nor from any later position, which would pass through here.
        self._silent_BT = ~(grad_BTD != 0).any(2).int().flip(1).cummax(1).values.flip(1).bool()
        self._pooled = public.pools
        self._derivative = Derivative(value_of, trunk_out_BTD)
        self._metric = metric_of(self._derivative, grad_BTD)
        value = self._derivative.value
        rows_WE = public.head_VD.detach()
        if few:
            rows_WE = torch.eye(len(rows_WE), dtype=value.dtype, device=value.device)
        self.codebook = Codebook(
            rows_WE,
            value,
            self._metric,
            logits_of=(lambda logits: logits) if few else public.head,
            slopes_of=(lambda _logits: None) if few else public.slopes,
        )
        self.labels_BT = torch.full(value.shape[:2], NO_LABEL, device=value.device)
        self.residual_B = value.new_full((len(value),), torch.inf)
        self.scale = 0.0
        self.iterations = self._bettered = 0
        self.proven_B = torch.zeros(len(value), dtype=torch.bool, device=value.device)

    def run(self, iterations: int, tolerance: float, ridge: float, prior: Prior) -> None:
        """Iterate until the labels prove right, or as long as allowed."""
        carries = None if self._labelled_BT is None else self._labelled_BT.unsqueeze(-1)
        going_on = bool(self._grad_BTD.any())
        while going_on:
            # What is read already is subtracted, and the rest solved for: an error then is a part
            # of what is left, not of the whole, and labels of which little is heard come through.
            known_BTE = self._known()
            rest_BTD = self._grad_BTD - self._derivative.pull(known_BTE)
            look, begun = 5, self.iterations
            for change_BTE in descend(
                self._derivative, rest_BTD, self._metric, carries_BT1=carries, ridge=ridge
            ):
                self.iterations += 1
                ends = self.iterations >= iterations
                if self.iterations - begun == look or ends:
                    bettered = self._look(known_BTE + change_BTE, tolerance, prior)
                    look += max(5, look // 4)
                    if self.proven_B.all() or ends:
                        return
                    going_on = not bettered and bool((self.residual_B < _MOSTLY).all())
                    if going_on:
                        break
                # With noise in the gradient there comes no proof, and soon nothing better either.
                if self.iterations >= 2 * self._bettered + 40:
                    return

    def _known(self) -> Tensor:
        """Return the error signal of the labels that were read so far."""
        read_B11 = (self.residual_B < 1).view(-1, 1, 1)
        return self.scale * self.codebook.error_of(self.labels_BT) * read_B11

    def _look(self, error_BTE: Tensor, tolerance: float, prior: Prior) -> bool:
        """Read the labels from the error signal, and keep those that explain the gradient best.

        Return whether any explain it better than what was there.
        """
        scale = self.codebook.scale_of(error_BTE)
        if scale <= 0:
            return False
        nearest_BT = self.codebook.read(error_BTE, scale, prior)
        for carrying_BT in self._carrying(error_BTE, scale, nearest_BT):
            self._consider(nearest_BT.masked_fill(~carrying_BT, NO_LABEL), tolerance)
        return self._bettered == self.iterations

    def _consider(self, labels_BT: Tensor, tolerance: float) -> None:
        """Send these labels through the model; keep the rows that explain the gradient better."""
        back_BTD = self._derivative.pull(self.codebook.error_of(labels_BT))
        power = float(back_BTD.square().sum())
        scale = float((back_BTD * self._grad_BTD).sum()) / power if power else 0.0
        rest_BTD = self._grad_BTD - scale * back_BTD
        residual_B = _row_norm(rest_BTD) / _row_norm(self._grad_BTD).clamp_min(TINY)
        # What differs by less says nothing: rounding decides.
        slack_B = (1e-3 * self.residual_B).clamp_max(_ROUNDING)
        better_B = residual_B < self.residual_B - slack_B
        if not better_B.any():
            return
        self.labels_BT[better_B] = labels_BT[better_B]
        self.residual_B = torch.where(better_B, residual_B, self.residual_B)
        self.scale, self._bettered = scale, self.iterations
        loud_BT = self._grad_BTD.norm(dim=2)
        floor_BT = _ROUNDING * loud_BT.amax(1, keepdim=True)
        explained_BT = rest_BTD.norm(dim=2) <= tolerance * loud_BT + floor_BT
        self.proven_B |= better_B & explained_BT.all(1)

    def in_form(self, labels_BT: Tensor) -> Tensor:
        """Return labels as the model has them: at each position, or one a row."""
        if not self._pooled:
            return labels_BT
        at_B1 = (self.labels_BT != NO_LABEL).int().argmax(1, keepdim=True)
        return labels_BT.gather(1, at_B1).squeeze(1)

    def _carrying(self, error_BTE: Tensor, scale: float, nearest_BT: Tensor) -> Iterator[Tensor]:
        """Yield guesses at which positions carry a label, (B, T)."""
        if self._pooled:
            loudest_B1 = error_BTE.norm(dim=2).argmax(1, keepdim=True)
            yield torch.arange(error_BTE.shape[1], device=error_BTE.device) == loudest_B1
        elif self._labelled_BT is not None:
            yield self._labelled_BT
        else:
            # How much of its nearest label's signal is in a position? One that passes little is
            # solved for late, so what is found of it may still be small.
            error_BTE = self._metric.coordinates(error_BTE)
            signal_BTE = scale * self._metric.coordinates(self.codebook.error_of(nearest_BT))
            there_BT = (error_BTE * signal_BTE).sum(2)
            whole_BT = signal_BTE.square().sum(2)
            # A label of which the model is certain adds next to nothing. Where nothing could be
            # heard, the model's certainty is the better guess than that there is no label.
            rest_BT = torch.minimum(error_BTE.norm(dim=2), (error_BTE - signal_BTE).norm(dim=2))
            noise = rest_BT[~self._silent_BT].median()
            unheard_BT = whole_BT.sqrt() < noise
            for share in (0.1, 0.5):
                yield ((there_BT > share * whole_BT) | unheard_BT) & ~self._silent_BT


def _row_norm(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).norm(dim=1)


def invert_labels(
    public: PublicModel,
    trunk_out_BTD: Tensor,
    grad_BTD: Tensor,
    *,
    labelled_BT: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    iterations: int = 300,
    tolerance: float = 1e-2,
    ridge: float = 1e-6,
    prior: Prior = None,
) -> Inverted:
    """Return the labels from which a gradient at the upper cut was made.

    Works for any number of the client's layers at the top, for language models and classifiers,
    whatever the loss was scaled by. It iterates until the labels prove right, each position's
    gradient being explained, and no longer than `iterations`.

    Args:
        public: The public weights at the run's cut.
        trunk_out_BTD: What came down: the trunk's output.
        grad_BTD: What went up: the gradient of the loss with respect to it, as it was sent.
        labelled_BT: Which positions carry a label, if that is known; else it is found out.
        attention_mask: As the client's model was given it.
        position_ids: As the client's model was given them.
        iterations: How many at most. Tops of many layers need more.
        tolerance: What part of each position's gradient may stay unexplained in a proof.
        ridge: Weight of the solution's norm, relative to what the top passes on.
        prior: Log-probabilities of the labels (B, T, V), or "model" for those that the model
            itself gives at `trunk_out_BTD`: helps where the gradient is noisy.

    Raises:
        DataError: If the two tensors do not fit each other or the model, or are not finite.
        ConfigError: If the model has a single output: there are no labels to tell apart.

    References:
        Linear in the labels: section 3, A4 of the project's privacy notes; solved by non-convex
        matching in TAG (https://arxiv.org/abs/2103.06819) and BiSR
        (https://arxiv.org/abs/2409.00960).
    """
    _check(public, trunk_out_BTD, grad_BTD)
    mask = {"attention_mask": attention_mask, "position_ids": position_ids}
    dtype, device = public.head_VD.dtype, public.device
    z_BTD, g_BTD = (t.detach().to(device, dtype) for t in (trunk_out_BTD, grad_BTD))
    size = max(1, _POSITIONS_TOGETHER // z_BTD.shape[1])
    # Squares of a mean over many labels, or of a scaled loss, may leave the range of float32.
    largest = float(g_BTD.abs().max()) or 1.0
    pieces: list[_Inversion] = []
    for start in range(0, len(z_BTD), size):
        rows = slice(start, start + size)
        pieces.append(
            _Inversion(
                public,
                z_BTD[rows],
                g_BTD[rows] / largest,
                None if labelled_BT is None else labelled_BT[rows].to(device),
                {name: t[rows].to(device) for name, t in mask.items() if t is not None},
            )
        )
        given = prior[rows].to(device) if isinstance(prior, Tensor) else prior
        pieces[-1].run(iterations, tolerance, ridge, given)
    # Of rows of which nothing could be read nothing is explained.
    residual_B = torch.cat([piece.residual_B for piece in pieces]).nan_to_num(posinf=1.0)
    return Inverted(
        labels_BT=torch.cat([piece.in_form(piece.labels_BT) for piece in pieces]),
        likely_BT=torch.cat([piece.in_form(piece.codebook.likely()) for piece in pieces]),
        residual=float((residual_B * _row_norm(g_BTD)).norm() / g_BTD.norm().clamp_min(TINY)),
        residual_B=residual_B,
        iterations=max(piece.iterations for piece in pieces),
        scale=sum(piece.scale for piece in pieces) / len(pieces) * largest,
    )


def _check(public: PublicModel, trunk_out_BTD: Tensor, grad_BTD: Tensor) -> None:
    width = public.config.get_text_config().hidden_size
    if trunk_out_BTD.dim() != 3 or trunk_out_BTD.shape[2] != width:
        raise DataError(
            f"a trunk's output of shape {tuple(trunk_out_BTD.shape)} is not of this model: it must "
            f"be batch x tokens x {width}"
        )
    if grad_BTD.shape != trunk_out_BTD.shape:
        raise DataError(
            f"a gradient of shape {tuple(grad_BTD.shape)} does not belong to a trunk's output of "
            f"shape {tuple(trunk_out_BTD.shape)}: give both of the same forward"
        )
    if not (torch.isfinite(trunk_out_BTD).all() and torch.isfinite(grad_BTD).all()):
        raise DataError("the trunk's output or its gradient is not finite: no labels can be read")
    if public.head_VD.shape[0] < 2:
        raise ConfigError(
            "this model has a single output, a number and no label: label inversion is for "
            "language models and classifiers"
        )


def label_inversion(
    public: PublicModel,
    departures: Iterable[Departure],
    trunk_outs: Iterable[Tensor],
    *,
    iterations: int = 300,
    ridge: float = 1e-6,
    prior: Prior = None,
) -> Finding:
    """Return what the gradients of a run give away about its labels (A4).

    The attacker knows neither how many labels there are nor which positions carry one.

    Args:
        public: The public weights at the run's cut.
        departures: What left, with the truth; those without a gradient or labels are left out.
        trunk_outs: The trunk's output of each departure, (B, T, D), as the server has it.
        iterations: As `invert_labels` has it.
        ridge: As `invert_labels` has it.
        prior: As `invert_labels` has it.

    Raises:
        DataError: If a gradient does not fit, or no departure has gradients and labels.
    """
    begun = time.monotonic()
    recovered: list[Recovered] = []
    answers: list[Inverted] = []
    invented = carried_labels = 0
    for departure, trunk_out_BTD in zip(departures, trunk_outs, strict=True):
        truth = _labels_of(public, departure)
        if departure.gradient_BTD is None or truth is None:
            continue
        found = invert_labels(
            public,
            trunk_out_BTD,
            departure.gradient_BTD,
            attention_mask=departure.carried.get("attention_mask"),
            position_ids=departure.carried.get("position_ids"),
            iterations=iterations,
            ridge=ridge,
            prior=prior,
        )
        answers.append(found)
        columns = (t.cpu().view(len(truth), -1) for t in (truth, found.labels_BT, found.likely_BT))
        for truth_T, guess_T, likely_T in zip(*columns, strict=True):
            there_T = truth_T != NO_LABEL
            carried_labels += int(there_T.sum())
            invented += int((guess_T[~there_T] != NO_LABEL).sum())
            if there_T.any():
                rows = (tuple(t[there_T].tolist()) for t in (truth_T, guess_T, likely_T))
                recovered.append(Recovered(*rows))
    if not answers:
        raise DataError(
            "no departure has both a gradient and labels: label inversion needs a run that trains "
            "with the labels at the client"
        )
    residual_B = torch.cat([answer.residual_B for answer in answers])
    layers = public.config.get_text_config().num_hidden_layers
    return finding_of(
        "A4",
        "gradients",
        recovered,
        seconds=time.monotonic() - begun,
        params={
            "top_layers": layers - public.cut.upper,
            "iterations": iterations,
            "ridge": ridge,
            "prior": prior if isinstance(prior, str) else prior is not None,
        },
        extra={
            "iterations_used": max(answer.iterations for answer in answers),
            "residual_median": float(residual_B.median()),
            "sequences_proven": float((residual_B < _PROVEN).float().mean()),
            "labels_invented": invented,
            "labels": carried_labels,
        },
    )


def _labels_of(public: PublicModel, departure: Departure) -> Tensor | None:
    """Return the label that each position carries, (B, T), or each row, (B,)."""
    labels = departure.truth.get("labels")
    if public.pools or labels is None:
        return labels
    # The token after a position is its label; the last position has none.
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
