"""Five documented sets of settings, each with the sentence that says what it is worth."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cutlayer.errors import ConfigError

__all__ = ["PROFILES", "Profile", "profile_of"]


@dataclass(frozen=True)
class Profile:
    """What a name under `split_privacy_profile` stands for."""

    name: str
    train: tuple[str, ...]
    """Parts whose adapter is trained, of `bottom`, `trunk`, `top`."""
    verdict: str
    """What it is worth, before any audit."""
    defenses: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    """Channel to what `defense_of` is called with; what the user names goes first."""
    needs: tuple[str, ...] = ()
    """Parameters that have no default and must be named."""
    attestation: bool = False
    """Nothing is sent before the server's evidence was verified."""
    ledger: bool = False
    """Every release is booked against a budget."""
    formal: bool = False
    """Whether its guarantee block has an (epsilon, delta)."""

    @property
    def backward(self) -> bool:
        """Whether gradients leave."""
        return self.defenses.get("gradients", {}).get("name") != "no_backward"


def _table(**channels: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return MappingProxyType({name: MappingProxyType(dict(p)) for name, p in channels.items()})


_NO_BACKWARD = {"name": "no_backward"}


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="open",
            train=("bottom", "trunk", "top"),
            verdict=(
                "no formal guarantee: whoever runs the server can read the text from the "
                "activations and the labels from the gradients"
            ),
        ),
        Profile(
            name="empirical",
            train=("trunk", "top"),
            defenses=_table(
                activations={"name": "gaussian", "nsr": 1.0, "channel": "activations"},
                gradients={"name": "gaussian", "nsr": 10.0, "channel": "gradients"},
            ),
            verdict=(
                "no formal guarantee: noise in proportion to the activations and the gradients "
                "lowers what today's attacks recover, by as much as the audit of this run measured"
            ),
        ),
        Profile(
            name="forward_only",
            train=("top",),
            defenses=_table(gradients=_NO_BACKWARD),
            verdict=(
                "labels never leave, since no gradient does and the bottom is frozen; the "
                "activations are plaintext to whoever runs the server, so there is no formal "
                "guarantee for the text"
            ),
        ),
        Profile(
            name="formal",
            train=("top",),
            defenses=_table(
                activations={"name": "ldp_sequence", "pool": 16, "spread": True},
                gradients=_NO_BACKWARD,
            ),
            needs=("clip", "epsilon", "delta", "planned"),
            ledger=True,
            formal=True,
            verdict=(
                "(epsilon, delta) per sequence over all booked releases, whoever runs the server "
                "and whatever it knows; labels never leave; padded lengths, timing and who takes "
                "part are not covered"
            ),
        ),
        Profile(
            name="attested",
            train=("trunk", "top"),
            attestation=True,
            verdict=(
                "no formal guarantee: the activations and gradients are plaintext inside an "
                "enclave whose evidence was verified, and hidden from the operator for as long as "
                "the hardware's maker, its firmware and the allowed measurements can be trusted"
            ),
        ),
    )
}
"""Name to profile."""


def profile_of(name: str, given: Mapping[str, Any] | None = None) -> Profile:
    """Return the profile of this name.

    Args:
        name: One of `PROFILES`.
        given: Parameters that the user names, to be checked against what the profile needs and
            against what it can hold.

    Raises:
        ConfigError: If it is unknown, if a needed parameter is missing, or if an epsilon is asked
            of a profile that has none.
    """
    if name not in PROFILES:
        near = difflib.get_close_matches(name, PROFILES, n=1)
        hint = f"did you mean {near[0]}" if near else f"one of {', '.join(PROFILES)}"
        raise ConfigError(f"split_privacy_profile = '{name}' is unknown: {hint}")
    profile = PROFILES[name]
    if given is None:
        return profile
    missing = [need for need in profile.needs if given.get(need) is None]
    if missing:
        raise ConfigError(
            f"split_privacy_profile = '{name}' promises a number and needs {', '.join(missing)}: "
            "name them, after looking at the table of what they cost"
        )
    if not profile.formal and given.get("epsilon") is not None:
        raise ConfigError(
            f"epsilon = {given['epsilon']!r} was asked of the profile '{name}', which has none: "
            "leave it out, or use the profile formal"
        )
    return profile
