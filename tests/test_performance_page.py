"""docs/performance.md says what the committed results say."""

from __future__ import annotations

import pytest

from benchmarks.report import GOALS, NOT_MEASURED, PAGE, Goal, lookup, page, row_of


def test_the_page_is_what_the_script_makes():
    """Whoever commits results runs benchmarks/report.py too."""
    assert PAGE.read_text() == page(), "run: python benchmarks/report.py"


def test_what_is_not_measured_is_said_to_be_so():
    """No figure is guessed."""
    found = lookup([])("step_overhead.balanced_ratio")

    assert found is None
    assert NOT_MEASURED in row_of(GOALS[0], found)


@pytest.mark.parametrize(
    ("goal", "value", "is_met"),
    [
        (Goal("G", "", "x", most=0.9), 0.9, True),
        (Goal("G", "", "x", most=0.9), 0.91, False),
        (Goal("G", "", "x", least=0.97), 0.96, False),
        (Goal("G", "", "x", 0.0, 0.0), 0.0, True),
        (Goal("G", "", "x", 0.0, 0.0), 1e-9, False),
        (Goal("G", "", "x", least=0.98, most=1.02), 1.03, False),
    ],
)
def test_a_goal_is_met_at_its_bound_and_not_beyond(goal: Goal, value: float, is_met: bool):
    """At most and at least mean what they say."""
    assert goal.is_met(value) == is_met
