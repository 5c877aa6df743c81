"""What a server reads of held-out wordings that leave through a defense whose numbers it knows.

Each attacker is given more than a server has, so that a defense is not praised for an attack's
weakness: the true tokens before the one that is sought, each sequence's clipping factor, and for
noise at the embedding the noisy embeddings themselves (the layers behind them could be inverted).
It is not given the noise.
"""

# Shapes:  B batch   T tokens   P tokens of a wording   D model width   V vocabulary   A answers

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.frontier.conditions import Scales
from benchmarks.frontier.task import Batch, Sample, Task
from benchmarks.one_process import Site
from cutlayer.audit.candidates import CandidateTable
from cutlayer.audit.forward_search import SearchSettings, search
from cutlayer.audit.labels import invert_labels
from cutlayer.audit.metrics import bootstrap, clopper_pearson
from cutlayer.audit.public import PublicModel
from cutlayer.audit.search import calibrated
from cutlayer.privacy.embedding import MetricDpEmbed
from cutlayer.privacy.mechanisms import (
    ClippedGaussian,
    Defense,
    GaussianNoise,
    LdpSequence,
    NoisyGrad,
)

__all__ = ["Attacker"]

_RUNGS = (256, 1024)
_EXACT = 1e-4  # noise below this part of the signal is none


@dataclass(frozen=True)
class _Sent:
    """What was received of one wording, without padding and, if it can be, without the clip."""

    rows_TD: Tensor
    sigma: float
    """Standard deviation of the noise that is known to be on it."""


class Attacker:
    """The public model at a run's cut, and what is known of the kind of text."""

    def __init__(self, site: Site, task: Task, model: str, *, whole: bool) -> None:
        """Load the public model; `whole` also loads it unsplit, for its guess at the next token."""
        layers = site.anatomy.num_layers
        self.public = PublicModel.load(
            model, bottom_layers=site.cut.lower, top_layers=layers - site.cut.upper
        )
        self._task = task
        self._run = site.run(train=("top",))  # the untrained model, for what the trunk gives back
        self._run.client.eval()
        self._table = CandidateTable(self.public)
        self._exact = calibrated(self.public, SearchSettings(score="l2"))
        self._prior = _prior_of(model) if whole else None
        self._answered: dict[bytes, list[Tensor]] = {}
        self._embedding_VD = self._run.client.get_base_model().get_input_embeddings().weight

    # ------------------------------------------------------------------ what a defense is set by

    @torch.no_grad()
    def scales(self, samples: Sequence[Sample], batch_size: int) -> Scales:
        """Return the sizes of undefended text that is trained on in batches of this size."""
        batch = self._task.batch(samples)
        smashed_BTD = self._smashed(batch)
        pool = LdpSequence(clip=1e12, epsilon=1.0, delta=1e-5, pool=16)
        grads_BTD = self.gradients(batch, batch.answer_B, self._trunk_out(batch, smashed_BTD))

        def median(rows: Tensor) -> float:
            return float(rows.flatten(1).norm(dim=1).median())

        embedded = self._embedding_VD[batch.ids_BT[batch.mask_BT == 1]]
        return Scales(
            activations=median(smashed_BTD * batch.mask_BT[..., None]),
            pooled=median(pool.signal(smashed_BTD, batch.mask_BT)),
            # A batch's loss is the mean over its rows.
            gradients=median(grads_BTD) * len(samples) / batch_size,
            embedding=float(embedded.norm(dim=-1).median()),
            width=smashed_BTD.shape[-1],
        )

    # ------------------------------------------------------------------ the activations

    @torch.no_grad()
    def read_text(
        self,
        samples: Sequence[Sample],
        defense: Defense | None,
        pool: Sequence[Sample],
        *,
        searched: int,
    ) -> dict[str, float]:
        """Return the share of tokens found one by one, and of wordings found in a known list.

        Args:
            samples: What is sent.
            defense: Through which it is sent.
            pool: All wordings that the attacker knows of.
            searched: How many of the samples are searched token by token, which takes longest.
        """
        batch = self._task.batch(samples)
        clean_BTD = self._smashed(batch)
        pooled = isinstance(defense, LdpSequence) and defense.pool is not None
        sent = [] if pooled else self._sent(batch, clean_BTD, defense)
        hits, sizes = [], []
        for sample, one in zip(samples[:searched], sent, strict=False):
            found = self._search(sample, one, defense)
            hits.append(sum(a == b for a, b in zip(found, sample.ids, strict=True)))
            sizes.append(len(sample.ids))
        picked = [
            self._picked(sample, row, clean_BTD, batch, defense, sent, pool)
            for row, sample in enumerate(samples)
        ]
        figures = proportion("listed", picked)
        if hits:
            low, high = bootstrap(hits, sizes)
            figures |= {"tokens": sum(hits) / sum(sizes), "tokens_low": low, "tokens_high": high}
        return figures

    def _smashed(self, batch: Batch) -> Tensor:
        return self.public.bottom(
            batch.ids_BT, attention_mask=batch.mask_BT, position_ids=batch.positions_BT
        )

    def _sent(self, batch: Batch, clean_BTD: Tensor, defense: Defense | None) -> list[_Sent]:
        sigma_B = [0.0] * len(clean_BTD)
        left_BTD = clean_BTD
        if isinstance(defense, MetricDpEmbed):
            left_BTD = defense.apply(self._embedding_VD[batch.ids_BT], batch.mask_BT)
        elif defense is not None:
            left_BTD = defense.apply(clean_BTD, batch.mask_BT)
        if isinstance(defense, GaussianNoise):
            rms = float(clean_BTD[batch.mask_BT == 1].square().mean().sqrt())
            sigma_B = [defense.nsr * rms] * len(clean_BTD)
        elif isinstance(defense, ClippedGaussian):
            norm_B = (clean_BTD * batch.mask_BT[..., None]).flatten(1).norm(dim=1)
            factor_B = (defense.clip / norm_B).clamp_max(1)
            left_BTD = left_BTD / factor_B[:, None, None]
            sigma_B = [defense.sigma * defense.clip / float(factor) for factor in factor_B]
        return [
            _Sent(rows_TD[mask_T == 1], sigma)
            for rows_TD, mask_T, sigma in zip(left_BTD, batch.mask_BT, sigma_B, strict=True)
        ]

    def _search(self, sample: Sample, one: _Sent, defense: Defense | None) -> list[int]:
        """Return the likeliest token at each position of a wording, after the true ones."""
        rows_PD = one.rows_TD[: len(sample.ids)]
        if isinstance(defense, MetricDpEmbed):
            return [
                int((self._log_prior(sample.ids[:place]) - defense.eta * distance_V).argmax())
                for place, distance_V in enumerate(torch.cdist(rows_PD, self._embedding_VD))
            ]
        settings = self._exact
        if one.sigma > _EXACT * float(rows_PD.square().mean().sqrt()):
            settings = SearchSettings(score="map", sigma=one.sigma, rungs=_RUNGS)
        truth_P = torch.tensor(sample.ids)
        prior = (
            (lambda before_T: self._log_prior(tuple(before_T.tolist()))) if self._prior else None
        )
        found = search(
            self.public, rows_PD, settings, truth=truth_P, prior=prior, table=self._table
        )
        return list(found.ids)

    @functools.cache  # noqa: B019  # one attacker a process
    def _log_prior(self, before: tuple[int, ...]) -> Tensor:
        if self._prior is None:
            return torch.zeros(len(self._embedding_VD))
        return self._prior(before)

    def _picked(
        self,
        sample: Sample,
        row: int,
        clean_BTD: Tensor,
        batch: Batch,
        defense: Defense | None,
        sent: list[_Sent],
        pool: Sequence[Sample],
    ) -> bool:
        """Say whether a wording is the likeliest of all known ones of its length."""
        listed = list(dict.fromkeys(s.ids for s in pool if len(s.ids) == len(sample.ids)))
        right = listed.index(sample.ids)
        if isinstance(defense, MetricDpEmbed):
            rows_NPD = self._embedding_VD[torch.tensor(listed)]
            apart_NP = (rows_NPD - sent[row].rows_TD[: len(sample.ids)]).norm(dim=-1)
            return int(apart_NP.sum(1).argmin()) == right
        known_NTD = self._known(tuple(listed))
        if sent:
            apart_N = (known_NTD - sent[row].rows_TD).flatten(1).norm(dim=1)
            return int(apart_N.argmin()) == right
        assert isinstance(defense, LdpSequence)
        keep_T = batch.mask_BT[row] == 1
        signal_1P = defense.signal(clean_BTD[row : row + 1, keep_T])[0]
        noise_1P = torch.randn_like(signal_1P) * defense.sigma * defense.clip
        apart_N = (defense.signal(known_NTD) - signal_1P - noise_1P).flatten(1).norm(dim=1)
        return int(apart_N.argmin()) == right

    def guessing(self, samples: Sequence[Sample], pool: Sequence[Sample]) -> float:
        """Return how often a wording is found by drawing one of its length from the list."""
        counts = [len({s.ids for s in pool if len(s.ids) == len(one.ids)}) for one in samples]
        return sum(1 / count for count in counts) / len(counts)

    @functools.cache  # noqa: B019
    def _known(self, listed: tuple[tuple[int, ...], ...]) -> Tensor:
        ids_NT = torch.tensor([(*ids, *self._task.question) for ids in listed])
        return torch.cat([self.public.bottom(some_NT) for some_NT in ids_NT.split(64)])

    # ------------------------------------------------------------------ the gradients

    def read_answers(
        self,
        batches: Sequence[Sequence[Sample]],
        defense: Defense | None,
        *,
        inverted: int,
        iterations: int = 30,
    ) -> dict[str, float]:
        """Return the share of answers that label inversion finds, and that trying each one finds.

        The attacker knows that there is one answer a row, at the last position, of the task's.

        Args:
            batches: What is sent, as it is in training: a gradient's size follows its batch's.
            defense: Through which it is sent.
            inverted: How many of the batches are inverted, which takes longest.
            iterations: Of label inversion, at most.
        """
        found: dict[str, list[bool]] = {"inverted": [], "tried": []}
        for number, samples in enumerate(batches):
            batch = self._task.batch(samples)
            out_BTD = self._trunk_out(batch, self._smashed(batch))
            sent_BTD = self.gradients(batch, batch.answer_B, out_BTD)
            if defense is not None:
                sent_BTD = defense.apply(sent_BTD)
            tried_AB = torch.stack(
                [
                    self._apart(guess_BTD, sent_BTD, defense)
                    for guess_BTD in self._guesses(batch, out_BTD)
                ]
            )
            found["tried"] += (tried_AB.argmin(0) == batch.answer_B).tolist()
            if number < inverted:
                labels_B = self._inverted(batch, out_BTD, sent_BTD, iterations)
                right_B = labels_B == self._task.answers_A[batch.answer_B]
                found["inverted"] += right_B.tolist()
        return {k: v for name, hits in found.items() for k, v in proportion(name, hits).items()}

    def _inverted(self, batch: Batch, out_BTD: Tensor, sent_BTD: Tensor, iterations: int) -> Tensor:
        last_BT = torch.zeros_like(batch.mask_BT, dtype=torch.bool)
        last_BT[:, -1] = True
        log_prior_BTV = torch.full((*last_BT.shape, self.public.vocabulary), -1e9)
        log_prior_BTV[..., self._task.answers_A] = 0.0
        return invert_labels(
            self.public,
            out_BTD,
            sent_BTD,
            labelled_BT=last_BT,
            attention_mask=batch.mask_BT,
            position_ids=batch.positions_BT,
            iterations=iterations,
            prior=log_prior_BTV,
        ).labels_BT[:, -1]

    def _guesses(self, batch: Batch, out_BTD: Tensor) -> list[Tensor]:
        """Return what each answer would send if nothing defended it; computed once a batch."""
        key = batch.ids_BT.numpy().tobytes()
        if key not in self._answered:
            self._answered[key] = [
                self.gradients(batch, torch.full_like(batch.answer_B, answer), out_BTD)
                for answer in range(len(self._task.answers_A))
            ]
        return self._answered[key]

    @staticmethod
    def _apart(guess_BTD: Tensor, sent_BTD: Tensor, defense: Defense | None) -> Tensor:
        """Return how far each row's gradient is from what a guess would have sent, (B,)."""
        if isinstance(defense, NoisyGrad):
            guess_BTD = defense.signal(guess_BTD)
        return (sent_BTD - guess_BTD).flatten(1).norm(dim=1)

    @torch.no_grad()
    def _trunk_out(self, batch: Batch, smashed_BTD: Tensor) -> Tensor:
        carried = {"attention_mask": batch.mask_BT, "position_ids": batch.positions_BT}
        return self._run.tenant.forward(1, smashed_BTD.clone(), carried)

    def gradients(self, batch: Batch, answer_B: Tensor, out_BTD: Tensor) -> Tensor:
        """Return the gradient of the mean loss at the upper cut before training, (B, T, D)."""
        with torch.enable_grad():
            point_BTD = out_BTD.detach().clone().requires_grad_(True)
            hidden_BTD = self.public.top(
                point_BTD, attention_mask=batch.mask_BT, position_ids=batch.positions_BT
            )
            logits_BV = self.public.head(hidden_BTD[:, -1:])[:, -1]
            loss = torch.nn.functional.cross_entropy(logits_BV, self._task.answers_A[answer_B])
            (grad_BTD,) = torch.autograd.grad(loss, point_BTD)
        return grad_BTD


def proportion(name: str, hits: Sequence[bool]) -> dict[str, float]:
    """Return the share of hits with its exact 95% interval."""
    low, high = clopper_pearson(sum(hits), len(hits))
    return {name: sum(hits) / len(hits), f"{name}_low": low, f"{name}_high": high}


def _prior_of(model: str) -> Callable[[tuple[int, ...]], Tensor]:
    """Return the public model's log-probabilities of the next token."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    start = whole.config.bos_token_id or 0

    @torch.no_grad()
    def prior(before: tuple[int, ...]) -> Tensor:
        ids_1T = torch.tensor([before or (start,)])
        return whole(input_ids=ids_1T, logits_to_keep=1).logits[0, -1].log_softmax(-1)

    return prior
