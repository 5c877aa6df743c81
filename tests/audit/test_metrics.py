"""Intervals say how little few sequences tell."""

from __future__ import annotations

import pytest

from cutlayer.audit.finding import Recovered
from cutlayer.audit.metrics import bootstrap, clopper_pearson, finding_of


@pytest.mark.parametrize("sequences", [2, 8, 64])
def test_nothing_read_of_few_is_not_nothing_for_sure(sequences: int):
    """An attack that fails on 8 texts may work on every tenth: the interval must not exclude it."""
    sizes = [6] * sequences

    low, high = bootstrap([0] * sequences, sizes)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / sequences)))
    assert bootstrap(sizes, sizes) == (pytest.approx(1 - high), 1.0)


def test_between_the_ends_whole_sequences_are_resampled():
    """One text of ten that is read whole, and none of the others: about one tenth, widely."""
    low, high = bootstrap([6, *[0] * 9], [6] * 10)

    assert low == 0.0
    assert 0.2 <= high <= 0.4


def test_a_finding_has_both_intervals():
    """Of tokens and of whole sequences."""
    found = finding_of("A1", "activations", [Recovered((1, 2), (3, 4))] * 4, seconds=1.0)

    assert found.trr_ci == found.exact_ci == clopper_pearson(0, 4)
