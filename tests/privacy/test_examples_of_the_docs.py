"""The examples of docs/privacy.md run as they stand, and what has no setting is refused as one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError
from cutlayer.privacy.defenses import settable_defense_of

PAGE = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int):
    """Each is at most 15 lines and does what it says; its own assertion holds."""
    example = EXAMPLES[number]

    assert len(example.splitlines()) <= 15
    exec(compile(example, f"docs/privacy.md, example {number + 1}", "exec"), {})


def test_there_is_one_for_each_call_without_a_setting():
    """DP-ZO, two servers and secure aggregation each have an example."""
    for call in ("loss_scalar", "two_server", "secagg"):
        assert any(call in example for example in EXAMPLES)


@pytest.mark.parametrize("name", ["loss_scalar", "two_server"])
def test_what_has_no_setting_is_refused_as_one(name: str):
    """Named in a run it would leave the gradient as it is; so it is refused before anything."""
    with pytest.raises(ConfigError, match="a Python call and no setting of a run"):
        settable_defense_of(name)
