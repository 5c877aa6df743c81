"""What DP-SGD promises to those who receive an adapter: epsilon, and the words around it.

References:
    Composition by privacy loss distributions: Koskela et al., 2020,
        https://arxiv.org/abs/1906.03049
    Renyi bound: Mironov et al., 2019, https://arxiv.org/abs/1908.10530
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

from cutlayer.errors import ConfigError

__all__ = ["Guarantee", "epsilon_of", "noise_multiplier_for", "planned_noise"]

_MEANINGLESS = 1e4
"""An epsilon above which the upper bound is as good as the tight one, which takes for ever."""


@functools.lru_cache(maxsize=256)
def epsilon_of(
    noise_multiplier: float,
    *,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
) -> float:
    """Return the epsilon of so many steps of the Poisson-sampled Gaussian mechanism.

    Neighbours differ in one example that is there or not.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, in units of the clip.
        sample_rate: The probability with which each example is in a batch.
        steps: How many batches.
        delta: The delta at which to give epsilon.
        accountant: `pld`, tight to four digits, or `rdp`, an upper bound.

    Raises:
        ConfigError: If no accountant is installed.
    """
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    try:
        import dp_accounting
        from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
        from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant
    except ImportError as error:
        raise ConfigError("an epsilon needs an accountant: pip install 'cutlayer[dp]'") from error
    step = dp_accounting.PoissonSampledDpEvent(
        sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    event = dp_accounting.SelfComposedDpEvent(step, steps)
    with _quiet("absl"):  # orders that do not converge are left out, which keeps the bound true
        rdp = float(RdpAccountant().compose(event).get_epsilon(delta))
    if accountant == "rdp" or rdp > _MEANINGLESS:
        return rdp
    # The grid follows epsilon, and PLD rounds up on it: a fixed one is slow for a large epsilon
    # and coarse for a small one.
    books = PLDAccountant(value_discretization_interval=max(rdp * 1e-4, 1e-7))
    return float(books.compose(event).get_epsilon(delta))


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def noise_multiplier_for(epsilon: float, *, sample_rate: float, steps: int, delta: float) -> float:
    """Return the smallest noise multiplier, to four digits, whose epsilon is not above this one.

    It is 0.05 at least.

    Raises:
        ConfigError: If no noise multiplier up to 1000 is enough.
    """

    def excess(noise_multiplier: float, accountant: str) -> float:
        found = epsilon_of(
            noise_multiplier,
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
            accountant=accountant,
        )
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
    asked = {"sample_rate": rate, "steps": max_steps or 1, "delta": delta}
    if noise_multiplier is None:
        assert epsilon is not None
        return noise_multiplier_for(epsilon, **asked)  # type: ignore[arg-type]
    spent = epsilon_of(noise_multiplier, accountant="pld", **asked)  # type: ignore[arg-type]
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
            f"{mechanism}. Adding or removing {self.unit}: epsilon {_up(self.epsilon)} at delta "
            f"{self.delta:g} ({self.accountant}; by RDP {_up(self.epsilon_rdp)}). It holds against "
            "those who receive the client's adapter and see nothing else of the training. It "
            "assumes that the server computes each row from that row alone and does not join with "
            "a recipient, and that what else depends on the data (how many items there are, the "
            "losses shown, the choice of settings) is not given away. It does not hold against the "
            "server, which sees each batch's activations, knows who is in the batch and, where the "
            "bottom trains, gets gradients without noise."
        )


def _up(epsilon: float) -> str:
    """Return epsilon to two digits, rounded up: a promise is never printed smaller than it is."""
    return f"{math.ceil(epsilon * 100) / 100:.2f}" if math.isfinite(epsilon) else "infinite"
