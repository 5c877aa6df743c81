"""One release: a tensor that leaves, by which mechanism, and whom it touches."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["CHANNELS", "Release"]

CHANNELS = ("activations", "gradients", "scalars")


@dataclass(frozen=True)
class Release:
    """What the accountant and the ledger know of one tensor that leaves.

    Attributes:
        mechanism: Its name in `DEFENSES`.
        channel: One of `CHANNELS`.
        unit: The neighbour relation in words: what may be replaced by what.
        clip: The bound C of the norm of what one unit contributes, 0 if there is none.
        sigma: Standard deviation of the noise in units of `clip` (without a clip: of the rms).
        noise_multiplier: The same in units of the sensitivity. Replacing a vector of norm C moves
            it by up to 2C, so this is sigma / 2.
        records: Opaque ids of the records that it touches; none means that it touches every one.
        formal: Whether the mechanism has an (epsilon, delta).
    """

    mechanism: str
    channel: str
    unit: str
    clip: float
    sigma: float
    noise_multiplier: float
    records: tuple[str, ...] = ()
    formal: bool = True

    def of(self, *records: str) -> Release:
        """Return the same release of these records."""
        return replace(self, records=records)
