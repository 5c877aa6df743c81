"""The guarantee block of an audit: what is promised, and a game that tries to refute it."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from cutlayer.audit.game import TRIALS, play
from cutlayer.errors import PrivacyError
from cutlayer.privacy.guarantee import guarantee
from cutlayer.privacy.mechanisms import ClippedGaussian, Defense
from cutlayer.privacy.release import Release

__all__ = ["promise_of"]

# An audit must not be called off by chance: the bound is wrong once in a million audits.
_CONFIDENCE = 1 - 1e-6
_MOST = 64
"""Releases that are played at most. A bound for some of them is one for all of them."""


def promise_of(
    defenses: Sequence[Defense],
    releases: Sequence[Release],
    *,
    delta: float | None,
    sent: Sequence[str],
    trained: Sequence[str],
    assumptions: Sequence[str] = (),
    trials: int = TRIALS,
) -> dict[str, Any]:
    """Return what is promised about one sequence, with the game's lower bound if it is a number.

    Args:
        defenses: Those of the run.
        releases: Those of the sequence that was released most, or those that are planned.
        delta: That of the ledger, or of the defenses.
        sent: Channels on which something leaves.
        trained: Parts that the client trains.
        assumptions: What the promise rests on besides.
        trials: Of the game, in each world.

    Raises:
        PrivacyError: If the game refutes the promise.
    """
    undefended = [
        channel for channel in sent if not any(d.channel == channel and d.formal for d in defenses)
    ]
    block = guarantee(
        releases, delta=delta, undefended=undefended, trained=trained, assumptions=assumptions
    )
    block["against"] = "the server"
    if block["epsilon"] is None:
        return block
    times = collections.Counter(release.mechanism for release in releases)
    bounds = [
        play(
            defense,
            trials=trials,
            confidence=_CONFIDENCE,
            releases=min(times[defense.name], _MOST),
        )
        for defense in defenses
        if isinstance(defense, ClippedGaussian) and times[defense.name]
    ]
    if not bounds:
        return block
    highest = max(bounds, key=lambda found: found.epsilon_lower)
    if highest.refuted or highest.epsilon_lower > block["epsilon"]:
        raise PrivacyError(
            f"the distinguishing game shows an epsilon of {highest.epsilon_lower:.2f} at least "
            f"where {block['epsilon']:.2f} would be promised, so nothing is promised: report this "
            "with the run's settings"
        )
    block["lower_bound"] = {
        "epsilon": highest.epsilon_lower,
        "delta": highest.delta,
        "trials": highest.trials,
    }
    return block
