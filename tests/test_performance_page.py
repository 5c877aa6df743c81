"""docs/performance.md says what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import (
    GOALS,
    NOT_MEASURED,
    PAGE,
    Goal,
    lookup,
    page,
    quick_table,
    results,
    row_of,
)


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


def test_a_quick_figure_is_never_taken_for_a_measured_one(tmp_path: Path):
    """It stands in the quick table, beside the committed one, and nowhere else."""
    for name, quick in (("quick", True), ("full", False)):
        path = tmp_path / "wan" / "results" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        run = {"figures": {"utilisation": 0.125 + quick}, "settings": {"quick": quick}}
        path.write_text(json.dumps(run))

    table = quick_table(tmp_path)
    of_full = lookup(results(tmp_path))("wan.utilisation")

    assert of_full is not None
    assert of_full.value == 0.125
    assert "| wan.utilisation | ≥ 0.97 | 1.125 |" in table
    assert f"| wan.ratio_20mbit_50ms | ≤ 0.95 | {NOT_MEASURED} |" in table
