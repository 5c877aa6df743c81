"""A1: read a text back from its activations by running the public bottom forward.

What position t sends depends on the tokens up to t only. So whoever has recovered the tokens
before t tries candidates for x_t and keeps the one whose activation is nearest to what was sent.
With public weights and no defense the match is exact, whatever the depth of the cut.

References:
    Nikolaou et al., 2025, https://arxiv.org/abs/2510.15511
    Thomas et al., 2025, https://arxiv.org/abs/2505.18332
    Noise of unknown strength: BeamClean, 2025, https://arxiv.org/abs/2505.13758
"""

# Shapes:  B texts   K nearest   T tokens   D width   V vocabulary

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cutlayer.audit.candidates import CandidateTable, Prefix, require_causal
from cutlayer.audit.finding import Finding, Recovered
from cutlayer.audit.metrics import finding_of
from cutlayer.audit.public import PublicModel
from cutlayer.audit.scores import fit_sigma
from cutlayer.audit.search import Prior, Searched, SearchSettings, calibrated, run_search
from cutlayer.errors import ConfigError, DataError, NotFinite

__all__ = ["Prior", "SearchSettings", "Searched", "estimate_sigma", "forward_search", "search"]

_LIKELY, _NEAREST = 1024, 64  # candidates of a row to try for the noise, and to fit it to


@torch.no_grad()
def search(
    public: PublicModel,
    smashed_TD: Tensor,
    settings: SearchSettings | None = None,
    *,
    truth: Tensor | None = None,
    prior: Prior | None = None,
    table: CandidateTable | None = None,
) -> Searched:
    """Return the text that sent these activations.

    Args:
        public: The model whose bottom is thought to have sent them.
        smashed_TD: What was received of one text, without padding.
        settings: How to search.
        truth: The true tokens, (T,): each position is then searched after the true prefix.
        prior: A language model's log-probabilities, for `map`.
        table: A table of candidates to share among calls.

    Raises:
        ConfigError: If the bottom is not causal or sends rows of another width.
        NotFinite: If what was received is not finite.
    """
    table = table or CandidateTable(public)
    settings = _completed(public, [smashed_TD], settings or SearchSettings(), (), table)
    return run_search(public, smashed_TD, settings, truth=truth, prior=prior, table=table)


@torch.no_grad()
def forward_search(
    public: PublicModel,
    smashed: Sequence[Tensor],
    truth: Sequence[Tensor],
    settings: SearchSettings | None = None,
    *,
    prior: Prior | None = None,
    baseline: Sequence[Tensor] | None = None,
    samples: Sequence[Tensor] = (),
    table: CandidateTable | None = None,
    attack: str = "A1",
    params: dict[str, Any] | None = None,
) -> Finding:
    """Return what forward search reads from the activations of several texts.

    The finding's rates are those of a server that knows nothing of the text (free-running). Its
    `extra` has those after the true prefix too (`forced`), which an early mistake cannot spoil.

    Args:
        public: The model whose bottom is thought to have sent them.
        smashed: What was received of each text, (T, D), without padding.
        truth: The tokens of each, (T,).
        settings: How to search.
        prior: A language model's log-probabilities, for `map`; its best guesses are the baseline.
        baseline: What the best guess without the traffic is instead, (T,) for each text.
        samples: Public texts, (T,) each, on which `eps` is found; random tokens if none.
        table: A table of candidates to share among calls.
        attack: The finding's name.
        params: More of how it was run, for the finding.

    Raises:
        ConfigError: If the bottom is not causal or sends rows of another width.
        DataError: If texts and activations are not of the same length.
        NotFinite: If what was received is not finite.
    """
    if [len(rows) for rows in smashed] != [len(ids) for ids in truth] or not sum(map(len, truth)):
        raise DataError(
            f"{len(smashed)} sequences of activations do not match {len(truth)} texts token by "
            "token: give each text with its own activations, without padding"
        )
    table, began = table or CandidateTable(public), time.perf_counter()
    free_s, making_s = 0.0, -table.seconds
    settings = _completed(public, smashed, settings or SearchSettings(), samples, table)
    free, forced, priors = [], [], []
    for number, (rows_TD, ids_T) in enumerate(zip(smashed, truth, strict=True)):
        known = None if prior is None else _Remembering(prior)
        run: dict[str, Any] = {"prior": known, "table": table}
        started = time.perf_counter() - table.seconds
        free.append(run_search(public, rows_TD, settings, truth=None, **run))
        free_s += time.perf_counter() - table.seconds - started
        if not free[-1].exact:
            settings = replace(settings, eps=0.0)
        # Where all is right, the recovered prefix is the true one.
        whole = free[-1].ids == tuple(ids_T.tolist())
        again = free[-1] if whole else run_search(public, rows_TD, settings, truth=ids_T, **run)
        forced.append(again)
        guesses = _best_guesses(known, ids_T) if baseline is None else baseline[number].tolist()
        priors.append(tuple(guesses))
    seconds = time.perf_counter() - began
    making_s += table.seconds

    def rates(of: Sequence[Searched], **more: Any) -> Finding:
        recovered = [
            Recovered(tuple(ids_T.tolist()), one.ids, guesses)
            for ids_T, one, guesses in zip(truth, of, priors, strict=True)
        ]
        return finding_of(attack, "activations", recovered, seconds=seconds, **more)

    after_truth = rates(forced)
    forced_facts = {name: getattr(after_truth, name) for name in ("trr", "trr_ci", "advantage")}
    return rates(
        free,
        params={**_facts(public, settings, prior), **(params or {})},
        extra={
            "forced": forced_facts,
            **_effort(free, public.vocabulary),
            "seconds_per_token": free_s / sum(map(len, truth)),
            "table_seconds": making_s,
        },
    )


@torch.no_grad()
def estimate_sigma(
    public: PublicModel,
    smashed: Sequence[Tensor],
    *,
    release: Callable[[Tensor], Tensor] | None = None,
    table: CandidateTable | None = None,
) -> float:
    """Return the standard deviation of the Gaussian noise on what was received.

    The first position's activation depends on one token only, so all its candidates are known
    exactly at any depth of the cut: the noise is fitted to their distances, as BeamClean does for
    embeddings.

    Args:
        public: The model whose bottom is thought to have sent them.
        smashed: What was received of each text, (T, D).
        release: What is known to be done to each row before the noise.
        table: A table of candidates to share among calls.
    """
    first_BD = torch.stack([rows_TD[0] for rows_TD in smashed]).to(public.device, torch.float32)
    table = table or CandidateTable(public)

    def measure(sent_ND: Tensor) -> Tensor:
        rows_ND = sent_ND if release is None else release(sent_ND)
        return torch.cdist(rows_ND, first_BD, compute_mode="donot_use_mm_for_euclid_dist")

    start = Prefix(public)
    roughly_VB = table.by_rows(start, table.shifts(start), measure)
    likely_N = roughly_VB.topk(min(_LIKELY, len(roughly_VB)), dim=0, largest=False).indices.unique()
    distances_NB = measure(start.after(likely_N))
    nearest_KB = distances_NB.topk(min(_NEAREST, len(likely_N)), dim=0, largest=False).values
    return fit_sigma(nearest_KB.T.square(), first_BD.shape[1])


def _completed(
    public: PublicModel,
    smashed: Sequence[Tensor],
    settings: SearchSettings,
    samples: Sequence[Tensor],
    table: CandidateTable,
) -> SearchSettings:
    """Check what was received and return the settings with all that they leave open."""
    require_causal(public)
    ids_1T = torch.zeros(1, 1, dtype=torch.long, device=public.device)
    width = settings.released(public.bottom(ids_1T)[0]).shape[-1]
    for rows_TD in smashed:
        if rows_TD.dim() != 2 or rows_TD.shape[1] != width:
            raise ConfigError(
                f"activations of shape {tuple(rows_TD.shape)} do not fit this bottom, whose rows "
                f"are {width} wide: audit with the model and the cut of the run"
            )
        if not bool(rows_TD.isfinite().all()):
            raise NotFinite(
                "the activations to be audited hold NaN or infinity: look at the run's loss first"
            )
    if settings.score == "map" and settings.sigma is None:
        sigma = estimate_sigma(public, smashed, release=settings.release, table=table)
        settings = replace(settings, sigma=sigma)
    return calibrated(public, settings, samples)


class _Remembering:
    """Ask a prior once only for each prefix of a text."""

    def __init__(self, prior: Prior) -> None:
        self._prior = prior
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, before_T: Tensor) -> Tensor:
        key = tuple(before_T.tolist())
        if key not in self._known:
            self._known[key] = self._prior(before_T)
        return self._known[key]


def _best_guesses(prior: Prior | None, ids_T: Tensor) -> list[int]:
    if prior is None:
        return []
    return [int(prior(ids_T[:position]).argmax()) for position in range(len(ids_T))]


def _facts(public: PublicModel, settings: SearchSettings, prior: Prior | None) -> dict[str, Any]:
    return {
        "bottom_layers": public.cut.lower,
        "score": settings.score,
        "beams": settings.beams,
        "rungs": list(settings.rungs),
        "eps": settings.eps,
        "sigma": settings.sigma,
        "release": settings.release is not None,
        "prior": prior is not None,
    }


def _effort(found: Sequence[Searched], vocabulary: int) -> dict[str, Any]:
    candidates = [number for one in found for number in one.candidates]
    return {
        "candidates_median": statistics.median(candidates),
        "candidates_mean": statistics.fmean(candidates),
        "candidates_share": statistics.fmean(candidates) / vocabulary,
        "margin_median": statistics.median(m for one in found for m in one.margins),
    }
