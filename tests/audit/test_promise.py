"""The guarantee block of an audit: a number with its lower bound, or why there is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cutlayer.audit.promise import promise_of
from cutlayer.errors import PrivacyError
from cutlayer.privacy.defenses import defense_of
from cutlayer.privacy.release import Release

NUMBERS: dict[str, Any] = {"clip": 1.0, "epsilon": 8.0, "delta": 1e-3, "planned": 4}
POOLED = defense_of("ldp_sequence", pool=16, spread=True, **NUMBERS)
NOISY = defense_of("noisy_grad", **NUMBERS)


def promised(*defenses: Any, **changed: Any) -> dict[str, Any]:
    """Return the block of some defenses, each of which released once."""
    asked: dict[str, Any] = {
        "releases": [release for defense in defenses for release in defense.releases(1)],
        "delta": 1e-3,
        "sent": ["activations"],
        "trained": ["top"],
        **changed,
    }
    return promise_of(defenses, asked.pop("releases"), **asked)


def test_the_bound_is_that_of_what_was_released():
    """One release of four that were planned: the game is played for one, and stays below it."""
    block = promised(POOLED)

    assert block["releases"] == 1
    assert block["epsilon"] < 4
    assert 0.5 * block["epsilon"] <= block["lower_bound"]["epsilon"] <= block["epsilon"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"trained": ["bottom", "top"]}, "the bottom is trained on the records"),
        ({"sent": ["activations", "gradients"]}, "gradients leave without a mechanism"),
        ({"delta": None}, "no delta was chosen"),
        ({"releases": []}, "nothing was released"),
    ],
)
def test_a_number_is_taken_away_with_its_reason(changed: dict[str, Any], why: str):
    """Whatever breaks the guarantee is named, and no bound is printed beside it."""
    block = promised(POOLED, **changed)

    assert block["guarantee"] == "no formal guarantee"
    assert why in block["why"]
    assert block.get("lower_bound") is None


def test_a_top_that_is_trained_spoils_gradients_only():
    """Gradients pass through the top, so that a trained one makes each depend on every record."""
    asked = {"sent": ["activations", "gradients"]}

    assert "the top is trained" in promised(POOLED, NOISY, **asked)["why"]
    assert promised(POOLED, NOISY, trained=["trunk"], **asked)["epsilon"] > 0


def test_a_promise_that_the_game_refutes_is_not_made():
    """Releases that were booked with more noise than the defense adds are found out."""
    (honest,) = POOLED.releases(1)
    lie: Release = dataclasses.replace(
        honest, sigma=20 * honest.sigma, noise_multiplier=20 * honest.noise_multiplier
    )

    with pytest.raises(PrivacyError, match="nothing is promised"):
        promised(POOLED, releases=[lie])
