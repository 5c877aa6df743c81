"""Epsilon to the digits of published and independently measured numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cutlayer.errors import ConfigError, PrivacyError
from cutlayer.privacy import accountant
from cutlayer.privacy.accountant import (
    analytic_epsilon,
    analytic_sigma,
    budget_of,
    check_target,
    epsilon_of,
    epsilon_of_adapter,
    max_releases,
    noise_table,
    reconstruction_bound,
    sigma_for,
)
from cutlayer.privacy.guarantee import NO_GUARANTEE, guarantee
from cutlayer.privacy.release import Release

DELTA = 1e-5
UNIT = "one sequence, replaced by any other of the same padded length"


def release(sigma: float, **changed: object) -> Release:
    """Return a release of D1 with this noise."""
    facts = {"mechanism": "ldp_sequence", "channel": "activations", "unit": UNIT, "clip": 1.0}
    return Release(**{**facts, "sigma": sigma, "noise_multiplier": sigma / 2, **changed})


@pytest.mark.parametrize(
    ("epsilon", "sigma", "digits"),
    [  # Balle and Wang, 2018, Algorithm 1, sensitivity 1, delta 1e-5
        (0.5, 7.03, 2),
        (1, 3.7306, 4),
        (2, 1.99, 2),
        (4, 1.08, 2),
        (8, 0.6002, 4),
        (16, 0.344, 3),
        (32, 0.205, 3),
        (64, 0.127, 3),
    ],
)
def test_analytic_gaussian(epsilon: float, sigma: float, digits: int):
    """The noise is the published one, solves the equation it is defined by, and is inverted."""
    found = analytic_sigma(epsilon, DELTA)

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    solved = phi(1 / (2 * found) - epsilon * found)
    solved -= math.exp(epsilon) * phi(-1 / (2 * found) - epsilon * found)
    assert round(found, digits) == sigma
    assert solved == pytest.approx(DELTA, rel=1e-6)
    assert analytic_epsilon(1 / found, DELTA) == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize(
    ("sigma", "releases", "epsilon"),
    [(1.2, 1, 8.00), (1.2, 3, 15.87), (2.4, 1, 3.55), (2.4, 3, 6.73), (10, 1, 0.73), (10, 3, 1.33)],
)
def test_releases_compose(sigma: float, releases: int, epsilon: float):
    """Noise of 1.2, 2.4 and 10 clips costs what was computed apart, and never less than exactly."""
    found = epsilon_of([release(sigma)] * releases, DELTA)

    exact = analytic_epsilon(math.sqrt(releases) * 2 / sigma, DELTA)
    assert round(found.pld, 2) == epsilon
    assert exact <= found.pld <= exact * (1 + 1e-6)
    assert found.pld <= found.rdp


def test_different_releases_compose_to_their_sum():
    """Both channels of one record, of different noise, cost what one Gaussian of both costs."""
    both = [release(3.0)] * 5 + [release(2.0, mechanism="noisy_grad", channel="gradients")] * 3

    found = epsilon_of(both, DELTA)

    mu = math.sqrt(5 * (2 / 3.0) ** 2 + 3 * (2 / 2.0) ** 2)
    assert found.pld == pytest.approx(analytic_epsilon(mu, DELTA), rel=1e-6)


@pytest.mark.parametrize(
    ("sigma", "rdp", "pld"),
    [(0.5, 9.02, 7.44), (0.7, 3.22, 2.47), (1.0, 1.20, 0.80), (1.5, 0.49, 0.38), (0.4888, None, 8)],
)
def test_adapters_of_dp_sgd(sigma: float, rdp: float | None, pld: float, measured: Any):
    """T-D4: 468 steps of 64 in 10,000 cost what was published, within .02; PLD is within RDP."""
    found = epsilon_of_adapter(sigma, 64 / 10_000, 468, DELTA)

    assert found.pld == pytest.approx(pld, abs=0.02)
    measured(pld=found.pld, rdp=found.rdp)
    assert found.pld <= found.rdp
    assert rdp is None or found.rdp == pytest.approx(rdp, abs=0.02)


@pytest.mark.parametrize(
    ("epsilon", "ratios"),
    [(8, (33, 376, 109, 54, 4.8)), (64, (7.0, 79.5, 22.9, 11.5, 1.0)), (1, (None, 2339))],
)
def test_noise_table(epsilon: float, ratios: tuple[float | None, ...]):
    """The table of what D1 costs has the digits of the specification."""
    rows = noise_table([epsilon], delta=DELTA)

    assert (rows[1].tokens, rows[1].width) == (128, 768)
    for row, ratio in zip(rows, ratios, strict=False):
        digits = 1 if epsilon == 64 or ratio == 4.8 else 0
        assert ratio is None or round(row.noise_over_signal, digits) == ratio


def test_reconstruction_bound():
    """With 384 nats of prior the bound bites above .036 clips of noise: a ratio of 11 a number."""
    prior = -3.0 * 128

    bites = 1 / 27.6
    assert reconstruction_bound([bites * 0.9], prior) > 0.99
    assert reconstruction_bound([bites * 1.1], prior) < 0.02
    assert round(bites, 3) == 0.036
    assert bites * math.sqrt(128 * 768) > 11
    # Four releases with twice the noise tell what one tells.
    assert reconstruction_bound([0.08] * 4, prior) == pytest.approx(
        reconstruction_bound([0.04], prior)
    )


@pytest.mark.parametrize("epsilon", [0.1, 1, 8, 64])
@pytest.mark.parametrize("planned", [1, 7, 468])
def test_planned_releases_fit_exactly(epsilon: float, planned: int):
    """Noise for n releases allows n of them by the accountant that is printed, and not one more."""
    sigma = sigma_for(epsilon, DELTA, planned)

    assert epsilon_of([release(sigma)] * planned, DELTA).pld <= epsilon
    assert epsilon_of([release(sigma)] * (planned + 1), DELTA).pld > epsilon
    assert max_releases(sigma / 2, epsilon, DELTA) == planned
    # Hardly more noise than the exact solution asks for.
    assert sigma <= 2 * analytic_sigma(epsilon, DELTA) * math.sqrt(planned) * (1 + 1e-6)


def test_accountants_that_contradict_each_other_stop_the_run(monkeypatch: pytest.MonkeyPatch):
    """If RDP, which is an upper bound, gives less than PLD, no epsilon is stated."""
    from dp_accounting.rdp import RdpAccountant

    monkeypatch.setattr(RdpAccountant, "get_epsilon", lambda self, delta: 0.5)
    accountant._gaussians.cache_clear()

    with pytest.raises(PrivacyError, match="contradict each other"):
        epsilon_of([release(1.2)], DELTA)
    accountant._gaussians.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0.0, DELTA), "epsilon = 0.0 must be a number above 0"),
        ((math.inf, DELTA), "epsilon = inf"),
        ((8, 0.0), "delta = 0.0 must be above 0"),
        ((8, 1.5), "delta = 1.5"),
        ((-1, 2), "epsilon = -1 must be .*; delta = 2"),
    ],
)
def test_targets_that_make_no_sense(arguments: tuple[float, float], says: str):
    """An epsilon or delta that says nothing is refused in a sentence that lists all faults."""
    with pytest.raises(ConfigError, match=says):
        check_target(*arguments)
    with pytest.raises(ConfigError, match=says):
        sigma_for(*arguments)


def test_delta_of_one_record_in_n():
    """At delta = 1/n a mechanism may publish a record outright: refused; just below it is not."""
    with pytest.raises(ConfigError, match=r"must be below 1/n = 0.001 for n = 1000 records"):
        check_target(8, 1e-3, records=1000)
    check_target(8, 0.99e-3, records=1000)


def test_an_epsilon_of_a_mechanism_that_has_none():
    """No epsilon is computed for noise without a clip, not even among formal releases."""
    informal = release(1.0, mechanism="gaussian", formal=False)

    with pytest.raises(ConfigError, match="epsilon was asked of 'gaussian', which has none"):
        epsilon_of([release(1.2), informal], DELTA)


def test_budget_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    """Asking again what a record may spend runs no accountant."""
    budget_of(3.25, DELTA)
    monkeypatch.setattr(accountant, "_dp", None)

    assert budget_of(3.25, DELTA) > 0


# ---------------------------------------------------------------------- the guarantee block


def test_guarantee_of_formal_releases():
    """The block names mechanism, neighbours, clip, noise, releases, accountant and epsilon."""
    block = guarantee([release(2.4, clip=5.0)] * 3, delta=DELTA, log_prior=-384.0)

    (mechanism,) = block["mechanisms"]
    assert block["guarantee"] == "(6.74, 1e-05)-differential privacy"  # 6.7347, rounded up
    assert block["epsilon"] == pytest.approx(6.7347, abs=1e-3)
    assert block["epsilon_rdp"] > 6.73
    assert (mechanism["clip"], mechanism["noise"], mechanism["releases"]) == (5.0, 12.0, 3)
    assert mechanism["neighbour_relation"] == UNIT
    assert "dp-accounting 0." in block["accountant"]
    assert block["reconstruction_bound"] < 1e-9
    assert any("no amplification by subsampling" in line for line in block["assumptions"])
    assert block["why"] == ""


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"undefended": ["gradients"]}, "gradients leave without a mechanism"),
        ({"trained": ["bottom"]}, "the bottom is trained on the records"),
        ({"delta": None}, "no delta was chosen"),
        ({"releases": []}, "nothing was released by a mechanism"),
        (
            {"releases": [release(1.2), release(1.0, mechanism="gaussian", formal=False)]},
            "gaussian: no epsilon exists for it",
        ),
        (
            {"releases": [release(1.2, channel="gradients")], "trained": ["top"]},
            "the top is trained on the records",
        ),
    ],
)
def test_no_guarantee_in_these_words(settings: dict[str, object], why: str):
    """Whatever leaves or trains beside a formal release, the block says so, and no epsilon."""
    given = {"releases": [release(1.2)], "delta": DELTA, **settings}
    block = guarantee(given.pop("releases"), **given)

    assert block["guarantee"] == "no formal guarantee" == NO_GUARANTEE
    assert block["epsilon"] is None
    assert why in block["why"]


def test_a_trained_top_leaves_activations_alone():
    """What the top learns does not pass through the activations: their epsilon stands."""
    assert guarantee([release(1.2)], delta=DELTA, trained=["top"])["epsilon"] is not None
