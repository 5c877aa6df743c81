"""Which label an error signal stands for: the nearest of what each label would have added."""

# Shapes:  B batch   T tokens   E directions of the error signal   W labels   N positions at once

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from cutlayer.audit.derivative import Metric

__all__ = ["TINY", "Codebook", "Prior"]

Prior = Tensor | Literal["model"] | None
TINY = 1e-30

# So many positions are held against the whole vocabulary at once, and so many rows of the head
# are brought into the metric at once.
_POSITIONS_AT_ONCE, _ROWS_AT_ONCE = 128, 8192
# Of the most that a label explains of any position.
_HEARD = 0.1


class Codebook:
    """What each label would add to the error signal at each position: e / scale = mean - row."""

    def __init__(
        self,
        rows_WE: Tensor,
        value_BTE: Tensor,
        metric: Metric,
        *,
        logits_of: Callable[[Tensor], Tensor],
        slopes_of: Callable[[Tensor], Tensor | None],
    ) -> None:
        """Begin.

        Args:
            rows_WE: The rows of the head, or one-hot rows where e is solved for in the logits.
            value_BTE: What the head is applied to, or the logits.
            metric: In which distances are taken.
            logits_of: The logits of pieces of it.
            slopes_of: How steeply they follow the head's output, or `None` for 1.
        """
        self._rows_WE = rows_WE
        self._metric = metric
        self._squares_W = torch.cat(
            [metric.shape(piece).square().sum(1) for piece in rows_WE.split(_ROWS_AT_ONCE)]
        )
        self._shape = value_BTE.shape[:2]
        self._value_NE = value_BTE.flatten(0, 1)
        self._logits_of = logits_of
        self._slopes_of = slopes_of
        means = [self._mean(piece) for piece in _pieces(self._value_NE)]
        self.mean_BTE = torch.cat(means).view(*self._shape, -1)

    def _mean(self, value_NE: Tensor) -> Tensor:
        probabilities_NW = self._logits_of(value_NE).softmax(-1)
        slopes_NW = self._slopes_of(value_NE)
        if slopes_NW is not None:
            probabilities_NW = probabilities_NW * slopes_NW
        return probabilities_NW @ self._rows_WE

    def likely(self) -> Tensor:
        """Return the label that the model itself finds likeliest, without any gradient."""
        best = [self._logits_of(piece).argmax(-1) for piece in _pieces(self._value_NE)]
        return torch.cat(best).view(self._shape)

    def error_of(self, labels_BT: Tensor) -> Tensor:
        """Return the error signal of these labels at scale 1, zero where there is none."""
        chosen_BT = labels_BT.clamp_min(0)
        rows_BTE = self._rows_WE[chosen_BT]
        slopes = [self._slopes_of(piece) for piece in _pieces(self._value_NE)]
        if known := [piece for piece in slopes if piece is not None]:
            slopes_NW = torch.cat(known)
            rows_BTE = rows_BTE * slopes_NW.gather(1, chosen_BT.view(-1, 1)).view(*self._shape, 1)
        return (self.mean_BTE - rows_BTE) * (labels_BT >= 0).unsqueeze(-1)

    def scale_of(self, error_BTE: Tensor) -> float:
        """Return by how much an error signal is scaled, when neither it nor the labels are known.

        The label whose signal points most nearly in the same direction needs no scale. Of the
        positions of which a label explains much, the half where one fits best then tell it.
        """
        votes, fits, scales = [], [], []
        shaped = (self._metric.shape(t.flatten(0, 1)) for t in (error_BTE, self.mean_BTE))
        pieces = (*map(_pieces, shaped), _pieces(self._value_NE))
        for error_NE, mean_NE, value_NE in zip(*pieces, strict=True):
            slopes_NW = self._slopes_of(value_NE)
            steep: Tensor | float = 1.0 if slopes_NW is None else slopes_NW
            dots_NW = (error_NE * mean_NE).sum(1, keepdim=True)
            dots_NW = dots_NW - self._against_rows(error_NE).mul_(steep)
            squares_NW = -self._closeness(mean_NE, 1.0, value_NE)
            squares_NW += mean_NE.square().sum(1, keepdim=True)
            # A label that is as good as certain adds a signal near zero, of no sure direction.
            squares_NW.clamp_min_(1e-3 * float(self._squares_W.mean()))
            vote_N, label_N = (dots_NW * squares_NW.rsqrt()).max(1)
            votes.append(vote_N)
            chosen = label_N.unsqueeze(1)
            fits.append(vote_N / error_NE.norm(dim=1).clamp_min(TINY))
            scales.append((dots_NW.gather(1, chosen) / squares_NW.gather(1, chosen)).squeeze(1))
        fit_N, scale_N = torch.cat(fits), torch.cat(scales)
        # Where there is no label there is only what is not solved for yet, which none explains.
        explained_N = torch.cat(votes)
        heard_N = explained_N > _HEARD * explained_N.max()
        if not heard_N.any():
            return 0.0
        fit_N, scale_N = fit_N[heard_N], scale_N[heard_N]
        return float(scale_N[fit_N >= fit_N.median()].median())

    def read(self, error_BTE: Tensor, scale: float, prior: Prior) -> Tensor:
        """Return the label at each position whose signal is nearest, (B, T).

        Args:
            error_BTE: The error signal that was solved for.
            scale: Of it.
            prior: As `invert_labels` has it. It is weighed against distances whose error is that
                of most positions.
        """
        sought_NE = self._metric.coordinates(self.mean_BTE - error_BTE / scale).flatten(0, 1)
        gain_N1 = self._metric.gain_BT.reshape(-1, 1)
        pieces = list(zip(*map(_pieces, (sought_NE, gain_N1, self._value_NE)), strict=True))
        spread = 0.0
        if prior is not None:
            nearest = [p[0].square().sum(1) - self._closeness(*p).amax(1) for p in pieces]
            spread = float(torch.cat(nearest).median()) / sought_NE.shape[1]
        labels = []
        for number, piece in enumerate(pieces):
            score_NW = self._closeness(*piece)
            if spread > 0:
                score_NW /= 2 * spread
                if isinstance(prior, Tensor):
                    score_NW += _pieces(prior.flatten(0, 1))[number]
                else:
                    score_NW += self._logits_of(piece[2]).log_softmax(-1)
            labels.append(score_NW.argmax(1))
        return torch.cat(labels).view(self._shape)

    def _closeness(self, sought_NE: Tensor, gain_N1: Tensor | float, value_NE: Tensor) -> Tensor:
        """Return the square of what is sought minus that of its distance to each row, (N, W)."""
        slopes_NW = self._slopes_of(value_NE)
        size = gain_N1 if slopes_NW is None else gain_N1 * slopes_NW
        return size * (2 * self._against_rows(sought_NE) - size * self._squares_W)

    def _against_rows(self, coordinates_NE: Tensor) -> Tensor:
        """Return the inner products with each row, in the metric, (N, W)."""
        return self._metric.coshape(coordinates_NE) @ self._rows_WE.T


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.split(_POSITIONS_AT_ONCE)
