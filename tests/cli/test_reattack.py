"""`adv_mi_bottom`: a bottom that was trained to say less is attacked anew before it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.main import main
from tests.cli.test_by_hand import one_sentence, saved_tiny, write_rows, write_run
from tests.site import Site
from tests.tokens import dataset

DEFENSE = {"name": "adv_mi_bottom", "weight": 2.0, "nsr": 0.05}


@pytest.fixture
def prepared(llama: Site, folder_of: Any, tmp_path: Path) -> Any:
    """A run's YAML over a served model, its rows, and public text beside it."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    # Few rows, but of enough tokens that half of them serve A5 as known text.
    words = " ".join(dataset(24)["text"]).split()
    write_rows(tmp_path, [{"text": " ".join(words[n * 17 : n * 17 + 17])} for n in range(8)])
    write_rows(tmp_path, [{"text": text} for text in dataset(66, seed=9)["text"]], "public.jsonl")
    write_rows(tmp_path, [{"text": text} for text in dataset(9)["text"]], "few.jsonl")

    def config(**settings: Any) -> str:
        asked = {
            "split_ca": str(llama.certs / "ca.pem"),
            "split_cert": None,
            "split_key": None,
            "split_bottom_layers": 2,
            "split_defenses": [DEFENSE],
            "split_public_text": str(tmp_path / "public.jsonl"),
            "max_steps": 6,
            **settings,
        }
        return str(write_run(tmp_path, model, llama.server.port, **asked))

    return config


def test_a_trained_bottom_is_attacked_anew(prepared: Any, tmp_path: Path, capsys: Any):
    """By one who knows it: its own inverter was fooled, and the text is read all the same."""
    assert main(["train", "--config", prepared()]) == 0

    found = json.loads((tmp_path / "out" / "reattack.json").read_text())
    for when in ("before", "after"):
        assert [one["attack"][:2] for one in found[when]["findings"]] == ["A1", "A2", "A5"]
    assert found["after"]["verdict"] == "plaintext"
    assert found["after"]["findings"][0]["trr"] > 0.9
    assert found["guarantee"] == "no formal guarantee"
    assert found["inverter_in_training_nats"] > 1.0
    assert "activations are plaintext" in capsys.readouterr().err
    assert "**plaintext**" in (tmp_path / "out" / "README.md").read_text()


def test_a_bottom_that_cannot_be_attacked_is_not_saved(prepared: Any, tmp_path: Path, capsys: Any):
    """Where the attack at the end fails, no adapter is written."""
    config = prepared(max_steps=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "reattack.json").mkdir()

    assert one_sentence(["train", "--config", config], capsys, "cannot write") == 8
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no bottom": ({"split_train": ["trunk", "top"]}, "split_train must have bottom"),
    "no public text": ({"split_public_text": None}, "split_public_text must name"),
    "with DP-SGD": (
        {"split_dp_sgd": {"target_epsilon": 8.0, "delta": 1e-3, "clip": 0.1}},
        "split_dp_sgd must go",
    ),
    "a parameter": ({"split_defenses": [DEFENSE | {"nsr": 0}]}, "nsr = 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused(name: str, prepared: Any, tmp_path: Path, capsys: Any):
    """In one sentence, before anything is sent."""
    settings, told = BAD[name]

    assert one_sentence(["train", "--config", prepared(**settings)], capsys, told) == 2
    assert not (tmp_path / "out").exists()


def test_too_little_public_text_is_refused(prepared: Any, tmp_path: Path, capsys: Any):
    """With fewer than 64 public texts the learned inverter would not be run."""
    config = prepared(split_public_text=str(tmp_path / "few.jsonl"))

    assert one_sentence(["train", "--config", config], capsys, "has 9 texts") == 2
