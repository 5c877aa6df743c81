"""`split_dp_sgd`: what the client trains is trained by DP-SGD, booked, and said on the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cutlayer.cli.main import main
from tests.cli.test_by_hand import cutlayer, one_sentence, saved_tiny, write_rows, write_run
from tests.site import Site
from tests.tokens import dataset

ASKED = {"target_epsilon": 6.0, "delta": 1e-2, "clip": 0.1}


@pytest.fixture
def prepared(llama: Site, folder_of: Any, tmp_path: Path) -> Any:
    """A run's YAML over a served model, with 24 rows."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    write_rows(tmp_path, [{"text": text} for text in dataset(24)["text"]])

    def config(**settings: Any) -> str:
        asked = {
            "split_ca": str(llama.certs / "ca.pem"),
            "split_cert": None,
            "split_key": None,
            "split_bottom_layers": 2,
            "split_dp_sgd": ASKED,
            "gradient_accumulation_steps": 4,
            "max_steps": 2,
            **settings,
        }
        return str(write_run(tmp_path, model, llama.server.port, **asked))

    return config


def told(folder: Path) -> dict[str, Any]:
    """Return what a run says it promises."""
    found: dict[str, Any] = json.loads((folder / "guarantee.json").read_text())
    return found


def test_a_run_trains_by_dp_sgd_and_says_what_it_promises(prepared: Any, tmp_path: Path):
    """As a process: only the client's layers move, epsilon is kept, booked and on the card."""
    config = prepared()
    printed = json.loads(
        "{"
        + cutlayer("train", "--config", config, "--format", "json", cwd=tmp_path).split("{", 1)[1]
    )
    assert (
        main(["merge", "--run", str(tmp_path / "out"), "--output", str(tmp_path / "adapter")]) == 0
    )

    assert printed["steps"] == 2
    promised = told(tmp_path / "adapter")["against_recipients_of_the_adapter"]
    assert 0 < promised["epsilon"] <= 6.0
    assert (promised["steps"], promised["sample_rate"], promised["clip"]) == (2, 8 / 24, 0.1)
    assert promised["formal"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "one row of train.jsonl" in card
    assert "does not hold against the server" in card
    assert "whoever runs the server can read the text" in card
    booked = (tmp_path / "train.jsonl.adapters.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in booked] == ["head", "adapter"]
    moved = {
        int(name.split("layers.")[1].split(".")[0])
        for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
        if "lora_B" in name and tensor.abs().sum() > 0
    }
    assert moved == {0, 1, 5}


def test_adapters_of_the_same_data_are_composed(prepared: Any, tmp_path: Path, capsys: Any):
    """A second adapter says what both tell; above a total nothing is trained."""
    outs = [tmp_path / "out", tmp_path / "out2"]
    for out in outs:
        assert main(["train", "--config", prepared(output_dir=str(out))]) == 0
    first, second = (told(out)["against_recipients_of_the_adapter"] for out in outs)

    assert second["adapters_of_this_data"] == 2
    assert second["epsilon"] == first["epsilon"] == first["epsilon_of_all_of_them"]
    assert second["epsilon"] < second["epsilon_of_all_of_them"] < 2 * second["epsilon"] + 1e-6
    assert "whoever has all of them" in (tmp_path / "out2" / "README.md").read_text()
    config = prepared(split_dp_sgd=ASKED | {"total_epsilon": 8.0}, output_dir=str(tmp_path / "o3"))
    assert one_sentence(["train", "--config", config], capsys, "total_epsilon is 8") == 9
    assert not (tmp_path / "o3" / "adapter_model.safetensors").exists()

    # Trained anew into the same folder without DP-SGD, the adapter has no guarantee any more.
    assert main(["train", "--config", prepared(split_dp_sgd=None, max_steps=1)]) == 0
    assert not (tmp_path / "out" / "guarantee.json").exists()
    assert "no formal guarantee" in (tmp_path / "out" / "README.md").read_text()


def test_the_profile_is_told_beside_it(prepared: Any, tmp_path: Path):
    """With `formal` both promises are there, each against its own party, and none for both."""
    config = prepared(
        split_privacy_profile="formal",
        split_privacy={"clip": 1.0, "epsilon": 8.0, "delta": 1e-2, "planned": 9},
    )
    assert main(["train", "--config", config]) == 0

    found = told(tmp_path / "out")
    assert found["against_the_server"]["profile"] == "formal"
    assert 0 < found["against_the_server"]["epsilon"] <= 8.0
    assert 0 < found["against_recipients_of_the_adapter"]["epsilon"] <= 6.0
    assert found["against_both_together"].startswith("no number")


BAD: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "an empty one": ({"split_dp_sgd": {}}, [], "target_epsilon is missing; delta is missing"),
    "a wrong name": ({"split_dp_sgd": ASKED | {"clipp": 1}}, [], "clipp is unknown: clip"),
    "no number": ({"split_dp_sgd": ASKED | {"clip": "small"}}, [], "clip = 'small'"),
    "epsilon 0": ({"split_dp_sgd": ASKED | {"target_epsilon": 0}}, [], "target_epsilon = 0"),
    "delta above 1/n": ({"split_dp_sgd": ASKED | {"delta": 0.05}}, [], "less than 1/24"),
    "the trunk": ({"split_train": ["trunk", "top"]}, [], "trains without noise"),
    "chunks": ({"split_chunks": 2}, [], "split_chunks must be 1"),
    "packing": ({"packing": True, "bf16": True}, [], "packing must be false; bf16 must be false"),
    "more than all": ({"gradient_accumulation_steps": 13}, [], "draws 26 of 24 rows"),
    "resume": ({}, ["--resume"], "begin again"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused(name: str, prepared: Any, tmp_path: Path, capsys: Any):
    """In one sentence that names it; nothing is trained and nothing booked."""
    settings, words, sentence = BAD[name]
    command = ["train", "--config", prepared(**settings), *words]

    assert one_sentence(command, capsys, sentence) == 2
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "train.jsonl.adapters.jsonl").exists()
