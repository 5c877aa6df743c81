"""`cutlayer plan`: from a config alone to a table, a picture and a recommendation."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.main import main

QUICK = ("--client_gflops", "50", "--server_gflops", "500", "--max_length", "16")


def planned(capsys: Any, *words: str) -> dict[str, Any]:
    """Return the plan as JSON."""
    assert main(["plan", *words, *QUICK, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def config(folder_of, tmp_path: Path) -> Path:
    """A folder with nothing but a config.json."""
    folder = tmp_path / "only-a-config"
    folder.mkdir()
    shutil.copy(folder_of("llama") / "config.json", folder)
    return folder


def test_every_cut_from_a_config_alone(config, capsys):
    """A folder or a file gives one row for each of the cuts, and one recommendation."""
    facts = planned(capsys, str(config), "--client_memory", "2GB")

    assert facts == planned(capsys, str(config / "config.json"), "--client_memory", "2GB") | {
        "model": str(config),
        "machine": facts["machine"],
    }
    assert len(facts["cuts"]) == 21
    assert {(row["bottom_layers"], row["top_layers"]) for row in facts["cuts"]} == {
        (bottom, top) for bottom in range(6) for top in range(6 - bottom)
    }
    for row in facts["cuts"]:
        numbers = [value for value in row.values() if isinstance(value, int | float)]
        assert all(math.isfinite(value) and value >= 0 for value in numbers)
        assert row["binds"] in row["chain_s"]
        assert sum(row["chain_s"].values()) == pytest.approx(row["step_s"])
        assert row["total_s"] == pytest.approx(row["step_s"] * facts["steps"])
    best = facts["recommended"]
    assert best["fits"]
    assert best["client_bytes"] <= 2e9
    assert best["reason"]
    assert "can be inverted" in facts["privacy"]
    assert "cutlayer audit" in facts["privacy"]


def test_a_link_asks_for_a_codec(config, capsys):
    """A fast link leaves every bit; over a slow one a codec is chosen, unless one was asked for."""
    fast = planned(capsys, str(config), "--bandwidth", "100Gbit", "--rtt", "0ms")
    slow = planned(capsys, str(config), "--bandwidth", "1Mbit", "--rtt", "0ms")
    asked = planned(capsys, str(config), "--bandwidth", "1Mbit", "--codec", "raw")

    assert (fast["codec"], asked["codec"]) == ("raw", "raw")
    assert slow["codec"] != "raw"
    assert slow["recommended"]["up_payload_bytes"] < asked["recommended"]["up_payload_bytes"]
    assert slow["recommended"]["binds"] in ("up", "down")


def test_rows_that_were_sent_are_counted_once(config, capsys):
    """Later epochs upload a reference a row, the total has one epoch of activations."""
    words = (str(config), "--train", "trunk,top", "--epochs", "3", "--codec", "raw")
    words += ("--bandwidth", "1Mbit", "--examples", "80")
    plain = planned(capsys, *words)
    once = planned(capsys, *words, "--send_once")
    width = json.loads((config / "config.json").read_text())["hidden_size"]

    for before, after in zip(_by_cut(plain), _by_cut(once), strict=True):
        assert after["first_epoch_step_s"] == before["step_s"] > after["step_s"]
        assert after["total_s"] == pytest.approx(10 * before["step_s"] + 20 * after["step_s"])
        saved = before["up_payload_bytes"] - after["up_payload_bytes"]
        assert saved == 8 * 16 * (4 * width + 4) - 8 * 35  # activations and mask, but for the ids


def _by_cut(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(facts["cuts"], key=lambda row: row["cut"])


@pytest.mark.parametrize(("name", "billions"), [("llama-1b", 1.24), ("llama-8b", 8.03)])
def test_models_are_planned_for_by_name(name, billions, capsys):
    """Llama's shapes need no file, and no memory of their size."""
    words = ("--batch_size", "2", "--server_on_gpu", "--gradient_checkpointing")
    facts = planned(capsys, name, "--dtype", "bfloat16", "--chunks", "2", *words)

    assert facts["parameters"] / 1e9 == pytest.approx(billions, rel=0.01)
    whole = {r["client_weight_bytes"] + r["server_weight_bytes"] for r in facts["cuts"]}
    assert whole == {2 * facts["parameters"]}


def test_the_table_says_what_to_set(config, capsys, tmp_path):
    """The text has the recommended settings, its mark, and what the plan does not weigh."""
    assert main(["plan", str(config), *QUICK, "--show", "3"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n* ") == 2  # the row, and what the mark means
    assert "split_bottom_layers=" in text
    assert "and 18 more" in text
    assert "can be inverted" in text


def test_pictures_are_pictures(config, capsys, tmp_path):
    """An SVG parses and names the axes; a PNG has its signature."""
    planned(capsys, str(config), "--plot", str(tmp_path / "new" / "plan.svg"))
    root = ET.parse(tmp_path / "new" / "plan.svg").getroot()
    assert root.tag.endswith("svg")
    assert "client memory, GiB" in "".join(root.itertext())

    planned(capsys, str(config), "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_nothing_fits_is_said(config, capsys):
    """If the client's memory is too small there is no recommendation, and it is said why."""
    assert main(["plan", str(config), *QUICK, "--client_memory", "100MB"]) == 0
    text = capsys.readouterr().out
    assert "Nothing fits" in text
    assert "\n! " in text
    facts = planned(capsys, str(config), "--client_memory", "100MB")
    assert facts["recommended"] is None
    assert not any(row["fits"] for row in facts["cuts"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bandwidth", "100Mbits!"), "--bandwidth 100Mbits!"),
        (("--bandwidth", "0Mbit"), "--bandwidth 0Mbit"),
        (("--bandwidth=-5Mbit",), "--bandwidth -5Mbit"),
        (("--bandwidth", "nanMbit"), "--bandwidth nanMbit"),
        (("--rtt", "40"), "--rtt 40"),
        (("--client_memory", "8"), "--client_memory 8"),
        (("--client_memory", "8Gb"), "--client_memory 8Gb"),
        (("--batch_size", "0"), "--batch_size 0"),
        (("--max_length=-1",), "--max_length -1"),
        (("--epochs=-1",), "--epochs -1"),
        (("--epochs", "inf"), "--epochs inf"),
        (("--train", "middle"), "--train middle"),
        (("--codec", "zip"), "--codec zip"),
        (("--codec", "int32"), "--codec int32"),
        (("--dtype", "int8"), "--dtype int8"),
        (("--optimizer", "magic"), "--optimizer magic"),
        (("--chunks", "9"), "--chunks 9"),
        (("--supervised", "1.5"), "--supervised 1.5"),
        (("--send_once",), "--send_once"),
        (("--client_gflops", "0"), "--client_gflops 0"),
        (("--plot", "plan.gif"), "--plot plan.gif"),
        (("--max_length", "9999"), "--max_length 9999"),
        (("--lora_target_modules", "nothing_like_it"), "LoRA"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(config, capsys, words, said):
    """Wrong units, signs and names end in one sentence with what was found, and no traceback."""
    assert main(["plan", str(config), *QUICK, *words]) != 0
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("model", ["/no/such/folder", "./nor/here/config.json", "nobody/nothing"])
def test_no_such_model(model, capsys):
    """A model that is not there is named, and what could be instead."""
    assert main(["plan", model, *QUICK]) != 0
    captured = capsys.readouterr()
    assert model in captured.err
    assert captured.err.count("\n") == 1


def test_experts_are_refused_in_one_sentence(folder_of, capfd):
    """Layers whose work depends on the tokens cannot be counted without them; it is said."""
    attention = ("--lora_target_modules", "q_proj,v_proj")
    for words, said in (((), "name the attention's modules"), (attention, "mixtral")):
        assert main(["plan", str(folder_of("mixtral")), *QUICK, *words]) != 0
        captured = capfd.readouterr()
        assert said in captured.err
        assert captured.err.count("\n") == 1


def test_this_machine_is_measured(config, capsys):
    """Without figures the plan measures a speed of its own, and says so."""
    assert main(["plan", str(config), "--max_length", "16", "--format", "json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert machine["measured_here"]
    assert machine["client_gflops"] > 0
    assert machine["server_gflops"] == machine["client_gflops"]


def test_help_is_light():
    """Asking for the verb's help imports no heavy library."""
    code = (
        "import sys\nfrom cutlayer.cli.main import main\n"
        "try:\n    main(['plan', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([n for n in ('torch', 'transformers', 'numpy', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.splitlines()[-1] == "[]"
