"""What researchers run by themselves: the recipe of tables, and the comparison with papers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.attacks import parity
from recipes import noise_and_permutation as recipe
from tests.audit.victims import DATA


def test_the_recipe_reads_through_permutation_rotation_and_rounding(tmp_path: Path):
    """T-A1b by Python calls alone; noise hides text only as it grows past the signal."""
    found = recipe.recoveries(recipe.tiny(str(tmp_path)), texts=3, tokens=9)

    assert found["nothing"] == 1
    assert found["permutation"] >= 0.99
    assert found["rotation"] >= 0.99
    assert found["int8"] >= 0.99
    assert found["int4"] >= 0.90
    assert found["noise 0.1"] > found["noise 3.0"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what the comparison with papers says when it refuses."""
    assert parity.main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def test_the_comparison_with_papers_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """No text, too little text, no model: one sentence each, and exit code 2."""
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text(json.dumps({"text": "one"}) + "\n")
    many.write_text((json.dumps({"text": "a text of some words"}) + "\n") * 200)
    model = str(DATA / "smollm2")

    assert "cannot be read" in refused(
        capsys, "--model", model, "--text", str(tmp_path / "none.jsonl")
    )
    assert "1 texts" in refused(capsys, "--model", model, "--text", str(few))
    assert "no model folder" in refused(
        capsys, "--model", str(tmp_path / "none"), "--text", str(many)
    )
