"""The operators' benchmarks run, at a size that says that much and what must hold at any size."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import benchmarks.attacks.run as attacks
from benchmarks.attacks.conditions import lossy_codecs
from benchmarks.attacks.parts import Part
from cutlayer.server.worker import _QUANTUM_S

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
    """The trunk's time is shared evenly, however much one tenant asks for, but for a quantum."""
    figures = figures_of("tenants", tmp_path / "tenants.json")
    settings = json.loads((tmp_path / "tenants.json").read_text())["settings"]
    fair_s = 6 * settings["seconds"] / max(settings["counts"])

    assert figures["jain"] >= 0.9
    assert figures["greedy_share_over_fair"] <= 1 + _QUANTUM_S / fair_s


def test_a_plan_is_near_what_a_run_takes(tmp_path: Path):
    """Memory and bytes of real processes are within 5% of what was predicted of them."""
    figures = figures_of("plan", tmp_path / "plan.json")

    assert figures["memory_error"] < 0.05
    assert figures["bytes_error"] < 0.05


def test_figures_of_an_earlier_commit_are_kept_until_their_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A part is measured anew once a file that it runs is another one, committed or not."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "attack.py").write_text("1")
    git("add", "attack.py")
    git("commit", "-qm", "one")
    monkeypatch.setattr(attacks, "ROOT", tmp_path)
    monkeypatch.setattr(attacks, "PARTIAL", tmp_path / "partial.jsonl")
    monkeypatch.setattr(attacks, "commit", lambda: git("rev-parse", "HEAD"))
    part = Part("a1", lambda: {}, ("attack.py",))
    measured_at = git("rev-parse", "HEAD")
    attacks.Kept().keep(part, {"a1": 1.0})

    git("commit", "-qm", "of other files", "--allow-empty")
    assert attacks.Kept().of(part) == ({"a1": 1.0}, measured_at)

    (tmp_path / "attack.py").write_text("2")
    assert attacks.Kept().of(part) is None
    attacks.Kept().keep(part, {"a1": 0.5})  # of no commit, so it is not written down
    git("commit", "-qam", "two")
    assert attacks.Kept().of(part) is None


@pytest.mark.slow
def test_the_attacks_read_a_tiny_model(tmp_path: Path):
    """Undefended, tokens and labels come back whole; every lossy codec has its rows."""
    figures = figures_of("attacks", tmp_path / "attacks.json")

    assert figures["a1_clean_trr"] == 1
    assert {figures[f"a4_m{top}"] for top in (0, 1, 2)} == {1}
    for codec in lossy_codecs("activations"):
        assert {f"a1_codec_{codec}", f"a2_codec_{codec}_trr"} <= set(figures)
    for codec in lossy_codecs("gradients"):
        assert f"a4_codec_{codec}_m2" in figures


@pytest.mark.slow
def test_a_step_over_a_link_is_timed_beside_the_unsplit_one(tmp_path: Path):
    """Ours, a peer and the unsplit model take turns, and train the same from the first step on."""
    figures = figures_of("wan", tmp_path / "wan.json")
    told = json.loads((tmp_path / "wan.json").read_text())["settings"]

    assert {"step_overhead.balanced_ratio", "wan.ratio_20mbit_50ms", "wan.utilisation"} <= {
        *figures
    }
    assert figures["wan.ratio_sequential_20mbit_50ms"] > 0
    # The link takes bytes and time: two messages of one row each, there and back, every step.
    assert figures["U_3+2_20mbit_50ms"] > figures["D_3+2_20mbit_50ms"] > 0
    assert figures["seconds_3+2_20mbit_50ms"] > 0.05
    losses = told["first_loss"].values()
    assert max(losses) - min(losses) < 0.05  # bf16 on the wire


def test_the_wire_is_measured(tmp_path: Path):
    """Bytes on the socket are those of the tensors and a little more."""
    figures = figures_of("transport", tmp_path / "transport.json")

    assert 1.0 < figures["bytes.wire_over_payload"] < 1.2
    assert figures["transport.cpu_s_per_gb_over_tcp_tls_1MiB"] > 0
    assert 0 < figures["transport.later_message_share_100mbit_50ms"] < 1.1


@pytest.mark.slow
def test_later_epochs_send_no_activations(tmp_path: Path):
    """Rows that are sent once are named afterwards, and the run is the same."""
    figures = figures_of("cache", tmp_path / "cache.json")

    assert (figures["later_epoch_upload"], figures["gradient_down"]) == (0, 0)
    assert figures["reference_bytes_per_row"] <= 64
    assert figures["rows_named"] >= 2 * figures["rows_sent"]
    assert figures["loss_largest_difference"] == 0


def test_fewer_bytes_are_counted_on_the_wire(tmp_path: Path):
    """Every codec trains through a real server, and none lets a token see another."""
    figures = figures_of("codecs", tmp_path / "codecs.json")

    assert figures["causality_violations"] == 0
    assert (
        figures["equal_loss.klt1_rotated1_ratio_steady"] < figures["equal_loss.int8_ratio_steady"]
    )
    assert figures["equal_loss.bf16_held_out"] < figures["equal_loss.untrained_held_out"]
    once = "equal_loss.once_rotated4_rotated3_rotated3"
    assert figures[f"{once}_ratio_steady"] < figures["equal_loss.int8_ratio_steady"] / 2
    assert figures[f"{once}_ratio_steady"] < figures[f"{once}_ratio_at_demo_size"]
    delta = "epochs.all_lr0.001_h2"
    assert figures[f"{delta}_within_0_2"] < figures[f"{delta}_within_0.2_2"]
    assert figures[f"{delta}_delta3_2_db"] < figures[f"{delta}_delta1_2_db"]


@pytest.mark.quantized
def test_options_of_the_trunk_are_measured_side_by_side(tmp_path: Path):
    """Each option's server is there with its client, and trains what the plain one trains."""
    spec = find_spec("bitsandbytes")
    assert spec is not None
    assert spec.origin is not None
    packages = str(Path(spec.origin).parents[1])
    figures = figures_of("trunk_options", tmp_path / "options.json", "--packages", packages)
    told = json.loads((tmp_path / "options.json").read_text())["settings"]

    stored = {"int8", "float8", "nf4", "int8_checkpointing", "nf4_checkpointing"}
    options = {"gradient_checkpointing", "torch_compile", *stored}
    for what in ("step", "trunk", "cpu", "peak", "resident"):
        assert {f"trunk_options.{what}_ratio_{name}" for name in options} <= {*figures}
    for kind in ("int8", "float8", "nf4"):
        assert 0 < abs(figures[f"trunk_options.nats_above_plain_{kind}"]) < 0.1
    losses = told["first_loss"]
    for name in ("plain", "int8", "nf4"):
        again = "gradient_checkpointing" if name == "plain" else f"{name}_checkpointing"
        assert losses[name] == losses[again]
    assert losses["plain"] == pytest.approx(losses["torch_compile"], abs=1e-4)
