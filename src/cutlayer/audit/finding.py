"""What one attack found, in numbers that can be compared and a verdict that is never an average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["VERDICTS", "Finding", "Recovered", "verdict_of", "worst"]

VERDICTS = ("plaintext", "severe", "partial", "near prior")
"""From worst to best."""


@dataclass(frozen=True)
class Recovered:
    """One sequence as it was and as an attack gave it back; the positions that were attacked."""

    truth: tuple[int, ...]
    """Token ids, or class labels."""
    guess: tuple[int, ...]
    """As many."""
    prior: tuple[int, ...] = ()
    """What the best guess would be without the traffic, as many or none."""


@dataclass(frozen=True)
class Finding:
    """What one attack found on one channel.

    Attributes:
        attack: Its name in `ATTACKS`.
        channel: `activations`, `gradients` or `adapter`.
        params: How it was run: score, iterations, cut, defense, …
        sequences: How many were attacked.
        tokens: How many tokens (or labels) in all.
        trr: Token recovery rate, the share of them that was given back.
        trr_ci: Its 95% interval, over sequences (see `metrics.bootstrap`).
        exact: Share of sequences given back whole.
        exact_ci: Its 95% interval, Clopper-Pearson.
        prior_trr: Share that the best guess without the traffic gets.
        advantage: (trr - prior_trr) / (1 - prior_trr).
        rouge: F-measures of ROUGE-1, -2 and -L on ids.
        seconds: What it took.
        extra: Whatever else this attack reports (candidates examined, margins, AUC, …).
        recovered: The sequences themselves; never written to a file that leaves the client.
    """

    attack: str
    channel: str
    params: dict[str, Any]
    sequences: int
    tokens: int
    trr: float
    trr_ci: tuple[float, float]
    exact: float
    exact_ci: tuple[float, float]
    prior_trr: float
    advantage: float
    rouge: dict[str, float]
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)
    recovered: tuple[Recovered, ...] = ()

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        return verdict_of(self.trr, self.advantage)

    def facts(self) -> dict[str, Any]:
        """Return all but the sequences, for a JSON file."""
        facts = asdict(self)
        del facts["recovered"]
        return {**facts, "verdict": self.verdict}

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Finding:
        """Return the finding of which `asdict` gave this, JSON in between or not."""
        recovered = tuple(
            Recovered(*(tuple(one[part]) for part in ("truth", "guess", "prior")))
            for one in kept["recovered"]
        )
        ends = {name: tuple(kept[name]) for name in ("trr_ci", "exact_ci")}
        return cls(**{**kept, **ends, "recovered": recovered})


def verdict_of(trr: float, advantage: float) -> str:
    """Return the word for a recovery rate and its advantage over the prior."""
    if trr >= 0.9 and advantage >= 0.1:
        return "plaintext"
    if trr >= 0.5 and advantage >= 0.1:
        return "severe"
    return "partial" if advantage >= 0.1 else "near prior"


def worst(findings: Sequence[Finding]) -> Finding | None:
    """Return the finding that decides about a channel: the strongest attack, never an average."""
    return min(
        findings, key=lambda f: (VERDICTS.index(f.verdict), -f.advantage, -f.trr), default=None
    )
