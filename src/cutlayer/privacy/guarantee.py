"""The guarantee block: what is promised about one sequence, or that nothing is."""

from __future__ import annotations

import collections
import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

from cutlayer.privacy.accountant import epsilon_of, reconstruction_bound
from cutlayer.privacy.release import Release

__all__ = ["NO_GUARANTEE", "guarantee"]

NO_GUARANTEE = "no formal guarantee"

_ASSUMPTIONS = (
    "every release of a sequence is booked, with retries, evaluation and inference",
    "the server sees who takes part, so no amplification by subsampling is counted",
    "the client's weights that a release passes through do not depend on the records",
    "padded lengths, masks, timing and who takes part are not covered",
    "noise is taken as real-valued; the rounding of floating point is not accounted for",
)


def guarantee(
    releases: Sequence[Release],
    *,
    delta: float | None,
    undefended: Sequence[str] = (),
    trained: Sequence[str] = (),
    log_prior: float | None = None,
    assumptions: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the guarantee block: what is promised about one sequence, or that nothing is.

    Args:
        releases: All releases of the sequence that was released most, each as often as it left.
        delta: Delta, if one was chosen.
        undefended: Channels on which something leaves without a mechanism.
        trained: Which parts the client trains on the records, of `bottom` and `top`. What passes
            through weights that were trained on every record depends on every record.
        log_prior: See `reconstruction_bound`, which is stated if this is given.
        assumptions: What else the promise rests on (non-collusion, attestation, ...).

    Raises:
        ConfigError: If delta makes no sense.
        PrivacyError: If the accountants contradict each other.
    """
    why = _why_none(releases, delta, undefended, trained)
    kinds = collections.Counter(release.of() for release in releases)
    block: dict[str, Any] = {
        "mechanisms": [
            {
                "mechanism": kind.mechanism,
                "channel": kind.channel,
                "neighbour_relation": kind.unit,
                "clip": kind.clip,
                "noise": kind.sigma * (kind.clip or 1.0),
                "sigma": kind.sigma,
                "noise_multiplier": kind.noise_multiplier,
                "releases": count,
                "formal": kind.formal,
            }
            for kind, count in kinds.items()
        ],
        "unit": "one sequence",
        "releases": len(releases),
        "accountant": _versions(),
        "epsilon": None,
        "epsilon_rdp": None,
        "delta": delta,
        "guarantee": NO_GUARANTEE,
        "why": why,
        "reconstruction_bound": None,
        "assumptions": [*_ASSUMPTIONS, *assumptions],
    }
    if why or delta is None:
        return block
    found = epsilon_of(releases, delta)
    block |= {"epsilon": found.pld, "epsilon_rdp": found.rdp}
    # Rounded up: a promise is never printed smaller than it is.
    shown = math.ceil(found.pld * 100 - 1e-6) / 100
    block["guarantee"] = f"({shown:.2f}, {delta:g})-differential privacy"
    if log_prior is not None:
        sigmas = [release.sigma for release in releases]
        block["reconstruction_bound"] = reconstruction_bound(sigmas, log_prior)
    return block


def _why_none(
    releases: Sequence[Release],
    delta: float | None,
    undefended: Sequence[str],
    trained: Sequence[str],
) -> str:
    informal = sorted({release.mechanism for release in releases if not release.formal})
    if undefended:
        return f"{' and '.join(undefended)} leave without a mechanism"
    if informal:
        return f"{' and '.join(informal)}: no epsilon exists for it"
    if not releases:
        return "nothing was released by a mechanism"
    if "bottom" in trained:
        return "the bottom is trained on the records, so each release depends on all of them"
    if "top" in trained and any(release.channel != "activations" for release in releases):
        return "the top is trained on the records, so each gradient depends on all of them"
    if delta is None:
        return "no delta was chosen"
    return ""


def _versions() -> str:
    try:
        version = importlib.metadata.version("dp-accounting")
    except importlib.metadata.PackageNotFoundError:
        return "none installed"
    return f"dp-accounting {version}: PLDAccountant, checked against RdpAccountant"
