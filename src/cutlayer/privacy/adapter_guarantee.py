"""What DP-SGD promises to those who receive an adapter: epsilon, and the words around it.

References:
    Composition by privacy loss distributions: Koskela et al., 2020,
        https://arxiv.org/abs/1906.03049
    Renyi bound: Mironov et al., 2019, https://arxiv.org/abs/1908.10530
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cutlayer.errors import ConfigError
from cutlayer.privacy.accountant import epsilon_of_adapter, rdp_of_adapter

__all__ = ["Guarantee", "noise_multiplier_for", "planned_noise", "up"]


def noise_multiplier_for(epsilon: float, *, sample_rate: float, steps: int, delta: float) -> float:
    """Return the smallest noise multiplier, to four digits, whose epsilon is not above this one.

    It is 0.05 at least.

    Raises:
        ConfigError: If no noise multiplier up to 1000 is enough.
    """

    def excess(noise_multiplier: float, accountant: str) -> float:
        asked = (noise_multiplier, sample_rate, steps, delta)
        found = rdp_of_adapter(*asked) if accountant == "rdp" else epsilon_of_adapter(*asked).pld
        return min(found, 1e6) - epsilon

    from scipy.optimize import brentq

    low, high = 0.05, 1000.0
    if excess(low, "rdp") <= 0:
        return low
    if excess(high, "rdp") > 0:
        raise ConfigError(
            f"epsilon={epsilon} cannot be had for {steps} steps at delta={delta}: a noise "
            "multiplier of 1000 is not enough; ask for a larger one, or for fewer steps"
        )
    # RDP is quick and never below PLD, so its answer is an upper end for the slow search.
    upper = float(brentq(excess, low, high, args=("rdp",), xtol=1e-3)) + 2e-3
    lower = upper / 1.25
    while excess(lower, "pld") < 0:
        lower /= 1.25
    near = float(brentq(excess, lower, upper, args=("pld",), xtol=5e-5))
    found = math.ceil(near * 1e4) / 1e4
    while excess(found, "pld") > 0:
        found = round(found + 1e-4, 4)
    return found


def planned_noise(
    noise_multiplier: float | None,
    epsilon: float | None,
    rate: float,
    max_steps: int | None,
    delta: float,
) -> float:
    """Return the noise multiplier, found or checked; before training, so that no accountant fails.

    Raises:
        ConfigError: If the noise does not keep to epsilon, or no accountant is installed.
    """
    steps = max_steps or 1
    if noise_multiplier is None:
        assert epsilon is not None
        return noise_multiplier_for(epsilon, sample_rate=rate, steps=steps, delta=delta)
    spent = epsilon_of_adapter(noise_multiplier, rate, steps, delta).pld
    if epsilon is not None and spent > epsilon:
        raise ConfigError(
            f"noise_multiplier={noise_multiplier} spends epsilon {spent:.3f} over {max_steps} "
            f"steps and epsilon={epsilon} is the limit: give more noise, or fewer epochs"
        )
    return noise_multiplier


@dataclass(frozen=True)
class Guarantee:
    """What may be said of an adapter that was trained so; `str` gives it in words."""

    epsilon: float
    """By privacy loss distributions."""
    epsilon_rdp: float
    """By Renyi divergences, as an upper check."""
    delta: float
    noise_multiplier: float
    clip: float
    sample_rate: float
    steps: int
    unit: str
    """What is there or not in neighbouring datasets."""
    accountant: str
    formal: bool
    """False if the noise can be drawn again, as in a test."""

    def __str__(self) -> str:
        """Return mechanism, unit, numbers, against whom, and what is assumed."""
        mechanism = (
            f"DP-SGD, {self.steps} steps: per-example gradients of the client's adapter clipped to "
            f"{self.clip:g}, Gaussian noise of {self.noise_multiplier:g} times that on their sum, "
            f"Poisson sampling at rate {self.sample_rate:.6g}"
        )
        if not self.formal:
            return f"{mechanism}. The noise was drawn from a seed: no formal guarantee."
        return (
            f"{mechanism}. Adding or removing {self.unit}: epsilon {up(self.epsilon)} at delta "
            f"{self.delta:g} ({self.accountant}; by RDP {up(self.epsilon_rdp)}). It holds against "
            "those who receive the client's adapter and see nothing else of the training. It "
            "assumes that the server computes each row from that row alone and does not join with "
            "a recipient, and that what else depends on the data (how many items there are, the "
            "losses shown, the choice of settings) is not given away. It does not hold against the "
            "server, which sees each batch's activations, knows who is in the batch and, where the "
            "bottom trains, gets gradients without noise."
        )


def up(epsilon: float) -> str:
    """Return epsilon to two digits, rounded up: a promise is never printed smaller than it is."""
    return f"{math.ceil(epsilon * 100) / 100:.2f}" if math.isfinite(epsilon) else "infinite"
