"""Which defenses are compared, at which strengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cutlayer.privacy.defenses import defense_of
from cutlayer.privacy.mechanisms import Defense

__all__ = ["Condition", "Scales", "conditions"]

DELTA = 1e-5


@dataclass(frozen=True)
class Scales:
    """Sizes of undefended text that the mechanisms are set by; taken from training wordings."""

    activations: float
    """Median Frobenius norm of a sequence's activations."""
    pooled: float
    """Median norm of their mean in 16 dimensions."""
    gradients: float
    """Median Frobenius norm of a sequence's gradient before training."""
    embedding: float
    """Median norm of a token's embedding."""
    width: int


@dataclass(frozen=True)
class Condition:
    """One point of the frontier before it is measured.

    Attributes:
        name: The defense, as the figures have it.
        strength: Its parameter; the defense is none or has none where it is `None`.
        parameter: That parameter's name.
        channel: What it defends.
        params: What `defense_of` is called with.
        train: Which parts are trained.
    """

    name: str
    channel: str
    parameter: str = ""
    strength: float | None = None
    params: tuple[tuple[str, Any], ...] = ()
    train: tuple[str, ...] = ("trunk", "top")

    @property
    def key(self) -> str:
        """Its name among the figures."""
        return self.name if self.strength is None else f"{self.name}_{self.strength:g}"

    def defenses(self) -> list[Defense]:
        """Return what defends it."""
        given = dict(self.params)
        return [defense_of(given.pop("name"), **given)] if given else []


def conditions(scales: Scales) -> list[Condition]:
    """Return all of them, the undefended one first, from weak to strong."""
    listed = [
        Condition("none", ""),
        Condition("no_backward", "gradients", train=("top",)),
    ]

    def at(
        name: str,
        channel: str,
        parameter: str,
        strengths: tuple[float, ...],
        params: Callable[[float], dict[str, Any]],
    ) -> None:
        for strength in strengths:
            given = tuple(params(strength).items())
            listed.append(Condition(name, channel, parameter, strength, given))

    def formal(name: str, clip: float, **more: Any) -> Callable[[float], dict[str, Any]]:
        return lambda epsilon: {
            "name": name, "clip": clip, "epsilon": epsilon, "delta": DELTA, **more,
        }  # fmt: skip

    epsilons = (131072.0, 16384.0, 2048.0, 256.0, 8.0)
    few = (2048.0, 256.0, 64.0, 8.0, 1.0)
    sites = "activations", "gradients"
    at("gaussian", sites[0], "nsr", (0.1, 0.3, 1.0, 3.0, 10.0),
       lambda nsr: {"name": "gaussian", "nsr": nsr, "channel": sites[0]})  # fmt: skip
    at("ldp_sequence", sites[0], "epsilon", epsilons,
       formal("ldp_sequence", scales.activations))  # fmt: skip
    # The strength is the mean length of the noise over that of an embedding.
    at("metric_dp_embed", sites[0], "noise_over_embedding", (0.3, 0.6, 1.0, 2.0, 4.0),
       lambda ratio: {"name": "metric_dp_embed",
                      "eta": scales.width / (ratio * scales.embedding)})  # fmt: skip
    at("noisy_grad", sites[1], "epsilon", epsilons,
       formal("noisy_grad", scales.gradients))  # fmt: skip
    at("ldp_pooled", sites[0], "epsilon", few,
       formal("ldp_sequence", scales.pooled, pool=16, spread=True))  # fmt: skip
    at("gaussian_gradient", sites[1], "nsr", (1.0, 3.0, 10.0, 30.0, 100.0),
       lambda nsr: {"name": "gaussian", "nsr": nsr, "channel": sites[1]})  # fmt: skip
    return listed
