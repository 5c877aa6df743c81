"""The table of defenses, and what is refused by name."""

# Shapes:  B sequences   T tokens   D model width

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.adversarial import AdversarialBottom
from cutlayer.privacy.embedding import MetricDpEmbed
from cutlayer.privacy.mechanisms import (
    SITES,
    Defense,
    GaussianNoise,
    LdpSequence,
    NoBackward,
    NoisyGrad,
)
from cutlayer.privacy.release import Release
from cutlayer.privacy.two_server import TwoServer
from cutlayer.privacy.zeroth_order import LossScalar

__all__ = [
    "DEFENSES",
    "REFUSED",
    "Chain",
    "Defense",
    "check_together",
    "defense_of",
    "settable_defense_of",
]

DEFENSES: dict[str, Callable[..., Defense]] = {
    LdpSequence.name: LdpSequence,
    MetricDpEmbed.name: MetricDpEmbed,
    GaussianNoise.name: GaussianNoise,
    AdversarialBottom.name: AdversarialBottom,
    NoBackward.name: NoBackward,
    LossScalar.name: LossScalar,
    NoisyGrad.name: NoisyGrad,
    TwoServer.name: TwoServer,
}
"""Name to the class that builds it."""

REFUSED: dict[str, str] = {
    "permutation": (
        "a server that sorts both sides matches them again: all tokens were recovered from "
        "activations under fresh secret permutations"
    ),
    "rotation": (
        "lengths and angles survive it: all tokens were recovered from norms and inner products "
        "under a secret rotation"
    ),
    "quantisation": (
        "rounding is a codec and hides nothing: all tokens were recovered at 8 bits and 99% at 4; "
        "choose it as split_codec if you want fewer bytes"
    ),
    "sparsification": (
        "what is left out of a gradient is not what tells the labels: 85% of them came back from a "
        "tenth of it"
    ),
    "projection": (
        "a public projection, random or not, is searched like the model itself: all tokens were "
        "recovered from 8 of 192 dimensions"
    ),
    "position_clip": (
        "clipping a gradient at each position leaves its direction: nearly all labels were "
        "recovered; noisy_grad clips whole sequences and adds noise"
    ),
    "nopeek": (
        "a low distance correlation is no obstacle to inversion: a line through the data has one "
        "and can be inverted; measure what an attack recovers instead"
    ),
    "private_bottom": (
        "known text of 64 tokens undoes a bottom that is kept secret: recovery went from 33% back "
        "to 90%; you may keep it secret, and nothing is promised for it"
    ),
    "r1smg": (
        "all of its noise lies on one random line, so that the likelihoods of two neighbours "
        "differ by hundreds of nats where it claims an epsilon of 5; use ldp_sequence"
    ),
}
"""Name to the reason, which reads on after a colon."""

_CALLS = {
    "loss_scalar": "a server that moves its adapter along a public direction",
    "two_server": "a second server that does not talk to the first",
}

_OTHER_NAMES = {
    "quantization": "quantisation",
    "int8": "quantisation",
    "int4": "quantisation",
    "shuffle": "permutation",
    "secret_bottom": "private_bottom",
    "top_k": "sparsification",
    "random_projection": "projection",
}


def defense_of(name: str, **params: Any) -> Defense:
    """Return the defense of this name.

    Args:
        name: One of `DEFENSES`.
        params: Its parameters.

    Raises:
        ConfigError: If it is refused or unknown, or a parameter makes no sense: an epsilon, for
            instance, of a mechanism that has none.
    """
    refused = _OTHER_NAMES.get(name, name)
    if refused in REFUSED:
        raise ConfigError(f"'{name}' is not offered as a defense: {REFUSED[refused]}")
    if name not in DEFENSES:
        near = difflib.get_close_matches(name, DEFENSES, n=1)
        hint = f"did you mean {near[0]}" if near else f"one of {', '.join(DEFENSES)}"
        raise ConfigError(f"'{name}' is no defense: {hint}")
    build = DEFENSES[name]
    known = list(inspect.signature(build).parameters)
    asked = [param for param in ("epsilon", "delta") if param in params and param not in known]
    if asked:
        raise ConfigError(
            f"{asked[0]} = {params[asked[0]]!r} was asked of '{name}', which has none: leave it "
            "out, or use ldp_sequence"
        )
    unknown = [param for param in params if param not in known]
    if unknown:
        raise ConfigError(
            f"'{name}' has no parameter {', '.join(unknown)}: it has {', '.join(known) or 'none'}"
        )
    try:
        return build(**params)
    except TypeError as error:
        raise ConfigError(f"'{name}': {_plain(error)}; it has {', '.join(known)}") from error


def settable_defense_of(name: str, **params: Any) -> Defense:
    """Return a defense that a run's file names.

    Raises:
        ConfigError: As `defense_of`, and if it needs a party that a run does not have.
    """
    if name in _CALLS:
        raise ConfigError(
            f"'{name}' is a Python call and no setting of a run: it needs {_CALLS[name]}; see "
            "docs/privacy.md"
        )
    return defense_of(name, **params)


def check_together(defenses: Sequence[Defense]) -> None:
    """Refuse two defenses in one place, of which only one would be applied.

    Raises:
        ConfigError: Naming both.
    """
    at: dict[str, str] = {}
    for defense in defenses:
        if defense.site in at:
            raise ConfigError(
                f"'{at[defense.site]}' and '{defense.name}' both stand at the {defense.site}, "
                "where one is applied: leave one of them out"
            )
        at[defense.site] = defense.name


def _plain(error: TypeError) -> str:
    """Return what is missing or of the wrong type, without the name of our function."""
    return str(error).split("() ")[-1]


class Chain:
    """Several defenses of one channel, applied one after the other.

    What follows a formal one is computed from its release and costs nothing; what goes before it is
    covered by its clip. So the chain is as formal as its most formal link, and books that link's
    releases; two formal links are both booked, which is more than they cost.

    Raises:
        ConfigError: If they are of different channels, in the wrong order, or if none is given.
    """

    name: ClassVar[str] = "chain"

    def __init__(self, *links: Defense) -> None:
        if not links or len({link.channel for link in links}) > 1:
            channels = ", ".join(f"{link.name} on {link.channel}" for link in links) or "nothing"
            raise ConfigError(
                f"a chain of {channels} cannot be applied: give defenses of one channel"
            )
        order = [SITES.index(link.site) for link in links]
        if len(set(order)) > 1:
            sites = ", ".join(f"{link.name} at the {link.site}" for link in links)
            raise ConfigError(f"a chain of {sites} has two places: apply each at its own")
        self.links = links

    @property
    def formal(self) -> bool:
        """Whether any link is."""
        return any(link.formal for link in self.links)

    @property
    def channel(self) -> str:
        """The channel of all of them."""
        return self.links[0].channel

    @property
    def site(self) -> str:
        """Where they all stand."""
        return self.links[0].site

    def describe(self) -> dict[str, Any]:
        """Return the name and parameters of each."""
        facts = {"name": self.name, "channel": self.channel, "site": self.site}
        links = [link.describe() for link in self.links]
        return {**facts, "formal": self.formal, "links": links}

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return the formal releases, or if there are none all of them."""
        links = [link for link in self.links if link.formal] or self.links
        return [release for link in links for release in link.releases(batch_size, records)]

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return what may leave."""
        for link in self.links:
            # A pooled release has no tokens left for the mask to be about.
            whole = mask_BT is None or mask_BT.shape[1] == tensor_BTD.shape[1]
            tensor_BTD = link.apply(tensor_BTD, mask_BT if whole else None)
        return tensor_BTD
