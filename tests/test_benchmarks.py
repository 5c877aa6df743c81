"""The operators' benchmarks run, at a size that says that much and what must hold at any size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def figures_of(name: str, output: Path, *words: str) -> dict[str, float]:
    """Run a benchmark in its quick form and return its figures."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / name / "run.py")]
    done = subprocess.run(
        [*command, "--quick", "--output", str(output), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures: dict[str, float] = json.loads(output.read_text())["figures"]
    return figures


def test_a_run_in_chaos_ends_as_the_calm_one(tmp_path: Path):
    """Kills of real processes lose no step, double none, and change no bit."""
    figures = figures_of("chaos", tmp_path / "chaos.json")

    assert figures["kills"] >= 3
    assert (figures["steps_lost"], figures["steps_doubled"]) == (0, 0)
    assert figures["adapter_bit_equal"] == 1


def test_the_fuzzer_finds_nothing(tmp_path: Path):
    """Thousands of streams of a stranger end in tensors or in a refusal."""
    figures = figures_of("fuzz", tmp_path / "fuzz.json")

    assert figures["executions"] >= 5_000
    assert figures["crashes"] == 0


def test_a_greedy_tenant_gets_no_more_than_its_share(tmp_path: Path):
    """The trunk's time is shared evenly, however much one tenant asks for."""
    figures = figures_of("tenants", tmp_path / "tenants.json")

    assert figures["jain"] >= 0.9
    assert figures["greedy_share_over_fair"] <= 1.25
