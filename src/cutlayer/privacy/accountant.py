"""What releases amount to: epsilon at a delta, by two accountants that must agree.

Everything here is about the server, which receives every release and sees who takes part. So each
release of a sequence counts in full: epochs, retries, evaluation, inference, both channels. No
amplification by subsampling is taken, and `Release` has no field to ask for it. The one exception
is `epsilon_of_adapter`, which is about who receives the finished adapter and sees no batch.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cutlayer.errors import ConfigError, PrivacyError
from cutlayer.privacy.release import Release

__all__ = [
    "Epsilon",
    "NoiseRow",
    "analytic_epsilon",
    "analytic_sigma",
    "budget_of",
    "check_target",
    "epsilon_of",
    "epsilon_of_adapter",
    "epsilon_of_adapters",
    "max_releases",
    "noise_table",
    "rdp_of_adapter",
    "reconstruction_bound",
    "sigma_for",
]

_SHAPES = ((1, 768), (128, 768), (128, 64), (128, 16), (1, 16))
_ROUNDING = 1e-9  # relative; a budget may be met exactly
_MEANINGLESS = 1e4  # above it the upper bound is as good as the tight one, which takes for ever


def _dp() -> Any:
    """Return dp-accounting, which comes with an extra."""
    try:
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ConfigError(
            "an epsilon needs an accountant, which is not installed: pip install 'cutlayer[dp]'"
        ) from error
    return dp_accounting


@dataclass(frozen=True)
class Epsilon:
    """One epsilon by both accountants."""

    pld: float
    """By privacy loss distributions: the figure to print."""
    rdp: float
    """By Renyi divergences: an upper bound on it."""
    delta: float


def check_target(
    epsilon: float | None, delta: float, *, records: int | None = None, where: str = ""
) -> None:
    """Raise unless (epsilon, delta) says something about each of `records` records.

    Raises:
        ConfigError: Listing what is wrong: epsilon not above 0, delta not in (0, 1), or not below
            1 / records, which would allow one record to be published outright.
    """
    faults = []
    if epsilon is not None and not (epsilon > 0 and math.isfinite(epsilon)):
        faults.append(f"epsilon = {epsilon!r} must be a number above 0")
    if not 0 < delta < 1:
        faults.append(f"delta = {delta!r} must be above 0 and below 1")
    elif records is not None and delta * records >= 1:
        faults.append(
            f"delta = {delta:g} must be below 1/n = {1 / records:.2g} for n = {records} records: "
            "at 1/n a mechanism may publish one of them"
        )
    if faults:
        raise ConfigError((f"{where}: " if where else "") + "; ".join(faults))


def analytic_sigma(epsilon: float, delta: float) -> float:
    """Return the noise of one Gaussian release of sensitivity 1 (Balle and Wang, 2018).

    Raises:
        ConfigError: If epsilon or delta make no sense.
    """
    check_target(epsilon, delta)
    return float(_dp().get_sigma_gaussian(epsilon, delta))


def analytic_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of a mu-Gaussian-DP mechanism (Dong, Roth and Su, 2022), 0 if mu is 0."""
    if mu <= 0:
        return 0.0
    return float(_dp().get_epsilon_gaussian(1 / mu, delta))


def epsilon_of(releases: Iterable[Release], delta: float) -> Epsilon:
    """Return what these releases of one record come to, all of them in full.

    Args:
        releases: Each one that touches the record, as often as it happened.
        delta: Delta.

    Raises:
        ConfigError: If delta makes no sense, or a mechanism among them has no epsilon.
        PrivacyError: If the accountants contradict each other.
    """
    check_target(None, delta)
    counts = collections.Counter(_multiplier(release) for release in releases)
    return _gaussians(tuple(sorted(counts.items())), delta)


def _multiplier(release: Release) -> float:
    if not release.formal:
        raise ConfigError(
            f"epsilon was asked of '{release.mechanism}', which has none: report what an attack "
            "recovers, or use ldp_sequence"
        )
    return release.noise_multiplier


@functools.lru_cache(maxsize=1024)
def _gaussians(counts: tuple[tuple[float, int], ...], delta: float) -> Epsilon:
    if not counts:
        return Epsilon(0.0, 0.0, delta)
    if any(z <= 0 for z, _ in counts):
        return Epsilon(math.inf, math.inf, delta)
    dp = _dp()
    if len(counts) == 1:
        event = dp.SelfComposedDpEvent(dp.GaussianDpEvent(counts[0][0]), counts[0][1])
    else:
        # Gaussians of different widths compose to one Gaussian, exactly; as events of their own
        # they would be rounded up one by one.
        event = dp.GaussianDpEvent(sum(n / z**2 for z, n in counts) ** -0.5)
    rdp = float(dp.rdp.RdpAccountant().compose(event).get_epsilon(delta))
    return _agreed(float(_pld_accountant(rdp).compose(event).get_epsilon(delta)), rdp, delta)


def _pld_accountant(scale: float) -> Any:
    """Return one whose grid follows epsilon: a fixed one is too coarse or endless.

    Args:
        scale: About what epsilon will be. The accountant rounds up whatever the grid.
    """
    return _dp().pld.PLDAccountant(value_discretization_interval=max(scale * 1e-4, 1e-8))


def _agreed(pld: float, rdp: float, delta: float) -> Epsilon:
    if not pld <= rdp:
        raise PrivacyError(
            f"the accountants contradict each other (PLD epsilon {pld:.6g} above RDP {rdp:.6g} at "
            f"delta {delta:g}): no epsilon can be stated; report this with the parameters"
        )
    return Epsilon(pld, rdp, delta)


@functools.lru_cache(maxsize=256)
def epsilon_of_adapter(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> Epsilon:
    """Return what DP-SGD promises against those who receive the adapter, never the server.

    Neighbours differ in one record that is there or not.

    Args:
        noise_multiplier: Noise over clip.
        sample_rate: Probability with which a record is in a batch (Poisson sampling).
        steps: How many batches.
        delta: Delta.

    Raises:
        ConfigError: If a number makes no sense.
        PrivacyError: If the accountants contradict each other.
    """
    rdp = rdp_of_adapter(noise_multiplier, sample_rate, steps, delta)
    if not 0 < rdp <= _MEANINGLESS:
        return Epsilon(rdp, rdp, delta)
    event = _dp_sgd(noise_multiplier, sample_rate, steps)
    pld = _pld_accountant(rdp).compose(event).get_epsilon(delta)
    return _agreed(float(pld), rdp, delta)


def epsilon_of_adapters(runs: Sequence[tuple[float, float, int]], delta: float) -> Epsilon:
    """Return what several adapters of one data set promise together, against whoever has them all.

    Args:
        runs: Noise multiplier, sample rate and steps of each.
        delta: Delta, of all together.

    Raises:
        ConfigError: If a number makes no sense.
        PrivacyError: If the accountants contradict each other.
    """
    steps_of: collections.Counter[tuple[float, float]] = collections.Counter()
    for noise_multiplier, sample_rate, steps in runs:
        steps_of[noise_multiplier, sample_rate] += steps
    alike = [(*kind, steps) for kind, steps in steps_of.items()]
    if len(alike) == 1:
        return epsilon_of_adapter(*alike[0], delta)
    for run in alike:
        rdp_of_adapter(*run, delta)  # checks the numbers
    dp = _dp()
    event = dp.ComposedDpEvent([_dp_sgd(*run) for run in alike])
    with _quiet("absl"):
        rdp = float(dp.rdp.RdpAccountant().compose(event).get_epsilon(delta))
    if not 0 < rdp <= _MEANINGLESS:
        return Epsilon(rdp, rdp, delta)
    return _agreed(float(_pld_accountant(rdp).compose(event).get_epsilon(delta)), rdp, delta)


@functools.lru_cache(maxsize=256)
def rdp_of_adapter(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return the upper bound of `epsilon_of_adapter` by Renyi divergences, which is quick.

    Raises:
        ConfigError: If a number makes no sense.
    """
    check_target(None, delta)
    if not (noise_multiplier > 0 and 0 < sample_rate <= 1 and steps >= 0):
        raise ConfigError(
            f"DP-SGD with noise_multiplier = {noise_multiplier!r}, sample_rate = {sample_rate!r} "
            f"and steps = {steps!r}: the first must be above 0, the second above 0 and at most 1, "
            "the third at least 0"
        )
    if steps == 0:
        return 0.0
    event = _dp_sgd(noise_multiplier, sample_rate, steps)
    with _quiet("absl"):  # orders that do not converge are left out, which keeps the bound true
        return float(_dp().rdp.RdpAccountant().compose(event).get_epsilon(delta))


def _dp_sgd(noise_multiplier: float, sample_rate: float, steps: int) -> Any:
    dp = _dp()
    sampled = dp.PoissonSampledDpEvent(sample_rate, dp.GaussianDpEvent(noise_multiplier))
    return dp.SelfComposedDpEvent(sampled, steps)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.lru_cache(maxsize=64)
def budget_of(epsilon: float, delta: float) -> float:
    """Return how much a record may spend, as a sum of 1 / noise_multiplier^2 over its releases.

    That sum is all that Gaussian releases need: they compose to the Gaussian of the sum. So the
    accountants run once a budget and never in a training step.

    Raises:
        ConfigError: If epsilon or delta make no sense.
    """
    z = analytic_sigma(epsilon, delta)
    while (found := _gaussians(((z, 1),), delta).pld) > epsilon:
        # PLD rounds up: take that much more noise than the exact solution, so that n planned
        # releases are n.
        z *= found / epsilon + _ROUNDING
    return z**-2


def max_releases(noise_multiplier: float, epsilon: float, delta: float) -> int:
    """Return how often a record may be released with this noise within (epsilon, delta).

    Raises:
        ConfigError: If epsilon or delta make no sense.
    """
    return math.floor(budget_of(epsilon, delta) * noise_multiplier**2 * (1 + _ROUNDING))


def sigma_for(epsilon: float, delta: float, releases: int = 1) -> float:
    """Return the noise, in units of the clip, of each of `releases` releases of a sequence.

    A clipped sequence that is replaced moves by up to twice the clip, hence the factor 2.

    Raises:
        ConfigError: If a number makes no sense.
    """
    if releases < 1:
        raise ConfigError(f"releases = {releases!r} must be at least 1")
    return 2 * math.sqrt(releases / budget_of(epsilon, delta))


def reconstruction_bound(sigmas: Sequence[float], log_prior: float) -> float:
    """Return an upper bound on the probability of guessing a whole sequence exactly.

    Phi(Phi^-1(prior) + mu), where mu = sqrt(sum of 1 / sigma^2): the releases are compared with
    noise around the centre of the clipping ball, so the distance is C and not 2C
    (Hayes, Balle and Mahloujifar, 2023, https://arxiv.org/abs/2302.07225).

    Args:
        sigmas: Each release's noise in units of its clip.
        log_prior: Natural logarithm of the prior probability of the likeliest sequence; with 3
            nats a token and 128 tokens, -384.
    """
    from scipy.special import ndtr, ndtri_exp

    mu = math.sqrt(sum(sigma**-2 for sigma in sigmas))
    return float(ndtr(ndtri_exp(log_prior) + mu))


@dataclass(frozen=True)
class NoiseRow:
    """What a guarantee costs for activations of one shape."""

    epsilon: float
    tokens: int
    width: int
    sigma: float
    """Standard deviation of each coordinate's noise in units of the clip."""
    noise_over_signal: float
    """Norm of the noise over the norm of a clipped sequence: sigma * sqrt(tokens * width)."""


def noise_table(
    epsilons: Sequence[float] = (1, 8, 64),
    *,
    delta: float = 1e-5,
    releases: int = 1,
    shapes: Sequence[tuple[int, int]] = _SHAPES,
) -> list[NoiseRow]:
    """Return what to print before anybody turns D1 on: the noise that each epsilon takes.

    Args:
        epsilons: Which.
        delta: Delta.
        releases: How many releases of each sequence are planned.
        shapes: (tokens, width) of a release: first one's own.

    Raises:
        ConfigError: If a number makes no sense.
    """
    return [
        NoiseRow(epsilon, tokens, width, sigma, sigma * math.sqrt(tokens * width))
        for epsilon in epsilons
        for sigma in [sigma_for(epsilon, delta, releases)]
        for tokens, width in shapes
    ]
