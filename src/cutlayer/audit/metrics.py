"""Recovery rates with their intervals, and what they would be without any traffic."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rouge_score import rouge_scorer
from scipy.stats import binomtest

from cutlayer.audit.finding import Finding, Recovered

__all__ = ["bootstrap", "clopper_pearson", "finding_of", "unigram_prior"]

_RESAMPLES = 2000


class _Ids:
    """Let rouge-score see ids as words."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def bootstrap(hits: Sequence[int], sizes: Sequence[int], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of sum(hits) / sum(sizes), resampling whole sequences.

    Tokens of one sequence are recovered together or not at all, so they are no independent draws.
    Where no token was read, or every one, resampling gives that alone, however few there were: the
    interval is then the exact one of how many sequences have a token that was read, or one not.
    """
    if len(sizes) < 2:
        return 0.0, 1.0
    if sum(hits) in {0, sum(sizes)}:
        return clopper_pearson(len(sizes) if sum(hits) else 0, len(sizes))
    drawn = np.random.default_rng(seed).integers(0, len(sizes), (_RESAMPLES, len(sizes)))
    rates = np.asarray(hits)[drawn].sum(1) / np.maximum(np.asarray(sizes)[drawn].sum(1), 1)
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """Return the exact 95% interval of a proportion."""
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(hits, trials).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def unigram_prior(texts: Iterable[Sequence[int]]) -> int:
    """Return the token that is most frequent in public text: the best blind guess."""
    counts = collections.Counter(token for text in texts for token in text)
    return counts.most_common(1)[0][0]


def finding_of(
    attack: str,
    channel: str,
    recovered: Sequence[Recovered],
    *,
    seconds: float,
    params: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Finding:
    """Return the finding that these recovered sequences amount to."""
    hits = [_hits(r.truth, r.guess) for r in recovered]
    sizes = [len(r.truth) for r in recovered]
    tokens = sum(sizes)
    trr = sum(hits) / max(tokens, 1)
    prior = sum(_hits(r.truth, r.prior) for r in recovered) / max(tokens, 1)
    whole = sum(hit == size for hit, size in zip(hits, sizes, strict=True))
    return Finding(
        attack=attack,
        channel=channel,
        params=params or {},
        sequences=len(recovered),
        tokens=tokens,
        trr=trr,
        trr_ci=bootstrap(hits, sizes),
        exact=whole / max(len(recovered), 1),
        exact_ci=clopper_pearson(whole, len(recovered)),
        prior_trr=prior,
        advantage=(trr - prior) / (1 - prior) if prior < 1 else 0.0,
        rouge=_rouge(recovered),
        seconds=seconds,
        extra=extra or {},
        recovered=tuple(recovered),
    )


def _hits(truth: Sequence[int], guess: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(truth, guess, strict=False))


def _rouge(recovered: Sequence[Recovered]) -> dict[str, float]:
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Ids())
    found = [
        scorer.score(" ".join(map(str, r.truth)), " ".join(map(str, r.guess))) for r in recovered
    ]
    return {
        name.removeprefix("rouge"): float(np.mean([f[name].fmeasure for f in found] or [0.0]))
        for name in ("rouge1", "rouge2", "rougeL")
    }
