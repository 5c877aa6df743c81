"""A game that can refute an epsilon and never prove one: which of two sequences was it?

A mechanism is run many times on each of two inputs that are as far apart as its clip allows. Who
knows both guesses from each output which it was. How often that succeeds bounds epsilon from below,
and a mechanism that claims less is wrong. This finds a forgotten factor of 2 and a misplaced
theorem; it finds nothing where the worst inputs are others than these.
"""

# Shapes:  N trials   T tokens   D width   K values of one output

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from scipy.special import gammaln, ndtri
from scipy.stats import binomtest
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.accountant import (
    analytic_epsilon,
    analytic_sigma,
    epsilon_of,
    epsilon_of_adapter,
)
from cutlayer.privacy.mechanisms import ClippedGaussian, Defense
from cutlayer.privacy.noise import secure_normal

__all__ = [
    "PLANTED",
    "TRIALS",
    "GameResult",
    "distinguish",
    "play",
    "play_planted",
    "r1smg_variance",
]

TRIALS = 20_000
"""A thousand would do at epsilon 8; at epsilon 1 their interval takes half of the bound away."""

_ROWS = 1000  # trials that are held at once
_FAR = 1e6  # times the clip: far beyond saturation

Outputs = Callable[[int, int], Tensor]
"""World (0 or 1) and number of trials to outputs, (N, K): independent runs of a mechanism."""


@dataclass(frozen=True)
class GameResult:
    """What came out.

    Attributes:
        trials: Runs in each world.
        false_positives: How many of world 0 were taken for world 1.
        false_negatives: How many of world 1 were taken for world 0.
        mu_lower: Lower bound on mu of Gaussian differential privacy.
        epsilon_lower: Lower bound on epsilon at `delta`.
        delta: Delta.
        confidence: With which probability at least the bounds hold.
        claimed: The epsilon that the mechanism states.
    """

    trials: int
    false_positives: int
    false_negatives: int
    mu_lower: float
    epsilon_lower: float
    delta: float
    confidence: float
    claimed: float | None = None

    @property
    def refuted(self) -> bool:
        """Whether the claim cannot be true."""
        return self.claimed is not None and self.epsilon_lower > self.claimed

    def facts(self) -> dict[str, Any]:
        """Return all of it, for a JSON file."""
        return {**asdict(self), "refuted": self.refuted}


def distinguish(
    outputs: Outputs,
    centres_2K: Tensor,
    *,
    delta: float,
    claimed: float | None = None,
    trials: int = TRIALS,
    confidence: float = 0.95,
    gaussian: bool = True,
) -> GameResult:
    """Play the game with the likelihood-ratio test of noise that falls off with distance.

    Args:
        outputs: The mechanism in each world.
        centres_2K: What it would put out without noise in each world, (2, K).
        delta: Delta.
        claimed: The epsilon that it states.
        trials: How often it is run in each world.
        confidence: Of the bounds: each of the two error rates is taken at the upper end of its
            Clopper-Pearson interval of this confidence, so that both hold together.
        gaussian: Whether the mechanism is Gaussian. Its errors then bound mu, and mu gives epsilon;
            for any other only ln((1 - delta - error) / other error) is sound, which is far lower.
    """
    errors = [_errors(outputs, centres_2K, world, trials) for world in (0, 1)]
    upper = [
        float(binomtest(e, trials).proportion_ci(confidence, method="exact").high) for e in errors
    ]
    mu = float(ndtri(1 - upper[0]) - ndtri(upper[1]))
    mu = max(mu, 0.0) if math.isfinite(mu) else 0.0
    lower = analytic_epsilon(mu, delta) if gaussian else _any_mechanism(upper, delta)
    return GameResult(trials, errors[0], errors[1], mu, lower, delta, confidence, claimed)


def _errors(outputs: Outputs, centres_2K: Tensor, world: int, trials: int) -> int:
    wrong = 0
    for start in range(0, trials, _ROWS):
        out_NK = outputs(world, min(_ROWS, trials - start)).double()
        own_N, other_N = ((out_NK - centres_2K[w].double()).norm(dim=1) for w in (world, 1 - world))
        wrong += int((own_N >= other_N).sum())
    return wrong


def _any_mechanism(upper: list[float], delta: float) -> float:
    bounds = [
        math.log((1 - delta - missed) / false)
        for missed, false in (upper, upper[::-1])
        if 1 - delta - missed > 0
    ]
    return max([0.0, *bounds])


def play(
    defense: Defense,
    *,
    trials: int = TRIALS,
    confidence: float = 0.95,
    tokens: int = 1,
    width: int = 16,
    releases: int | None = None,
) -> GameResult:
    """Play with a formal defense: its releases of one sequence against what they come to.

    The inputs are opposite and so large that the clip holds both. The shape hardly matters: noise
    in other directions than theirs tells nothing.

    Args:
        defense: `ldp_sequence`, `noisy_grad` or `loss_scalar`.
        trials: How often in each world.
        confidence: Of the bound.
        tokens: T of the inputs.
        width: D of the inputs.
        releases: How often the sequence is released; as often as was planned by default, which
            comes to the defense's own epsilon.

    Raises:
        ConfigError: If the defense has no epsilon that could be refuted.
    """
    if not isinstance(defense, ClippedGaussian):
        raise ConfigError(
            f"'{defense.name}' states no epsilon, so there is none to refute: report what an "
            "attack recovers"
        )
    count, claimed = defense.planned, defense.epsilon
    if releases is not None:
        count = releases
        claimed = epsilon_of(defense.releases(1) * releases, defense.delta).pld
    alone = defense.site == "loss"  # one number for a whole batch
    shape = (1,) if alone else (1, tokens, width)
    inputs = [torch.full(shape, sign * _FAR * defense.clip) for sign in (1.0, -1.0)]
    if not alone:
        inputs = [x * torch.linspace(0.5, 1.5, width) for x in inputs]

    def outputs(world: int, runs: int) -> Tensor:
        if alone:
            ran = [defense.apply(inputs[world]) for _ in range(runs * count)]
            return torch.stack(ran).reshape(runs, -1)
        rows_NTD = inputs[world].expand(runs, -1, -1)
        return torch.cat([defense.apply(rows_NTD).flatten(1) for _ in range(count)], 1)

    centres_2K = torch.stack([_centre(defense, x).repeat(count) for x in inputs])
    return distinguish(
        outputs,
        centres_2K,
        delta=defense.delta,
        claimed=claimed,
        trials=trials,
        confidence=confidence,
    )


def _centre(defense: Any, x: Tensor) -> Tensor:
    signal = defense.signal(x)
    if getattr(defense, "spread", False):
        # What is spread is a linear image of what was released.
        signal = (signal @ defense.projection_for(x).T).expand(-1, x.shape[1], -1)
    return torch.as_tensor(signal).flatten()


# ---------------------------------------------------------------------- planted faults


def _opposite(width: int) -> Tensor:
    """Return two inputs of norm 1 at a distance of 2, (2, K)."""
    one_K = torch.zeros(width, dtype=torch.float64)
    one_K[0] = 1.0
    return torch.stack([one_K, -one_K])


def _forgotten_factor(epsilon: float, delta: float) -> tuple[Outputs, Tensor]:
    """Calibrate for a sensitivity of C, where replacing a clipped sequence moves it by 2C."""
    centres_2K, sigma = _opposite(8), analytic_sigma(epsilon, delta)
    return lambda world, n: centres_2K[world] + sigma * secure_normal((n, 8)), centres_2K


def _dp_forward(epsilon: float, delta: float) -> tuple[Outputs, Tensor]:
    """Account as DP-Forward's code does: sensitivity C, and amplified by sampling of batches.

    A record is released once an epoch, 3 times here, whatever the sampling: the server sees each.
    """
    centres_2K, epochs, rate = _opposite(8), 3, 64 / 10_000
    steps = round(epochs / rate)

    def excess(log_sigma: float) -> float:
        found = epsilon_of_adapter(math.exp(log_sigma), rate, steps, delta)
        return math.log(found.rdp / epsilon)

    sigma = math.exp(brentq(excess, math.log(0.3), math.log(10.0), xtol=0.05))
    centres_2K = centres_2K.repeat(1, epochs)
    width = centres_2K.shape[1]
    return lambda world, n: centres_2K[world] + sigma * secure_normal((n, width)), centres_2K


def r1smg_variance(epsilon: float, delta: float, width: int, sensitivity: float = 1.0) -> float:
    """Return the variance that R1SMG takes (Ji and Li, 2024, https://arxiv.org/abs/2306.02256).

    2 sensitivity^2 / (epsilon psi), with psi = (delta Gamma((M-1)/2) / (sqrt(pi) Gamma(M/2))) to
    the power of 2 / (M-2), for M dimensions: it does not grow with M.
    """
    log_ratio = gammaln((width - 1) / 2) - gammaln(width / 2) - math.log(math.pi) / 2
    psi = math.exp((math.log(delta) + float(log_ratio)) * 2 / (width - 2))
    return 2 * sensitivity**2 / (epsilon * psi)


def _r1smg(epsilon: float, delta: float) -> tuple[Outputs, Tensor]:
    """Put all noise on one random line."""
    centres_2K = _opposite(768)
    scale = math.sqrt(r1smg_variance(epsilon, delta, 768, sensitivity=2.0))

    def outputs(world: int, trials: int) -> Tensor:
        line_NK = secure_normal((trials, 768))
        line_NK /= line_NK.norm(dim=1, keepdim=True)
        return centres_2K[world] + scale * secure_normal((trials, 1)) * line_NK

    return outputs, centres_2K


PLANTED: dict[str, Callable[[float, float], tuple[Outputs, Tensor]]] = {
    "forgotten_factor_2": _forgotten_factor,
    "dp_forward": _dp_forward,
    "r1smg": _r1smg,
}
"""Mechanisms that claim (epsilon, delta) and do not have it: a game that misses one is broken."""


def play_planted(
    name: str,
    epsilon: float,
    delta: float = 1e-5,
    *,
    trials: int = TRIALS,
    confidence: float = 0.95,
) -> GameResult:
    """Play with a planted fault; `refuted` of the result should be true."""
    outputs, centres_2K = PLANTED[name](epsilon, delta)
    return distinguish(
        outputs,
        centres_2K,
        delta=delta,
        claimed=epsilon,
        trials=trials,
        confidence=confidence,
        gaussian=name != "r1smg",
    )
