"""The README's commands, each a process of its own, and what bad input to them ends in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from cutlayer.cli.data import classes_of
from cutlayer.cli.main import main
from tests.site import ServerProcess, Site
from tests.tokens import dataset, tokenizer


def cutlayer(*words: object, cwd: Path) -> str:
    """Run a command as a user does; return what it printed."""
    command = [sys.executable, "-m", "cutlayer.cli.main", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_run(folder: Path, model: Path, port: int, **settings: Any) -> Path:
    """Write a run's YAML and return its path."""
    asked = {
        "model_name_or_path": str(model),
        "dataset_name": str(folder / "train.jsonl"),
        "use_peft": True,
        "lora_r": 3,
        "lora_target_modules": "all-linear",
        "learning_rate": 1.0e-2,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "max_length": 32,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": str(folder / "out"),
        "split_server": f"127.0.0.1:{port}",
        "split_bottom_layers": 1,
        "split_top_layers": 1,
        "split_ca": str(folder / "certs" / "ca.pem"),
        "split_cert": str(folder / "certs" / "client.pem"),
        "split_key": str(folder / "certs" / "client.key"),
        **settings,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in asked.items() if v is not None}))
    return path


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> None:
    """Write rows as JSON lines."""
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def saved_tiny(folder_of: Any, folder: Path, model_type: str, **settings: Any) -> Path:
    """Return a folder with a tiny model and a tokenizer."""
    model = folder / "model"
    model.mkdir()
    for file in folder_of(model_type, **settings).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer().save_pretrained(model)
    return model


def test_a_preview_counts_rows_that_are_sent_once(folder_of: Any, tmp_path: Path, capsys: Any):
    """Later epochs send the gradient alone, which is as large as the activations were."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    write_rows(tmp_path, [{"text": text} for text in dataset(24)["text"]])
    seen = []
    for settings in ({}, {"split_send_once": True}):
        once = {"split_train": ["trunk", "top"], "max_steps": None, "num_train_epochs": 3}
        config = write_run(tmp_path, model, 1, **once, **settings)
        assert main(["preview", "--config", str(config), "--format", "json"]) == 0
        seen.append(json.loads(capsys.readouterr().out))

    plain, once = seen
    assert plain["up_bytes_per_later_step"] == plain["up_bytes_per_step"]
    assert 2 * once["up_bytes_per_later_step"] == once["up_bytes_per_step"]
    assert once["up_bytes_per_step"] == plain["up_bytes_per_step"]


def test_the_readmes_commands(folder_of: Any, tmp_path: Path):
    """From certificates to a merged adapter that stock peft loads, with mutual TLS."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    texts = [{"text": text} for text in dataset(24)["text"]]
    write_rows(tmp_path, texts)
    cutlayer("certs", "init", "--dir", "certs", "--host", "127.0.0.1", cwd=tmp_path)
    flags = {"mutual_tls": True, "metrics_port": 0, "log_format": "json"}
    log = (tmp_path / "log").open("wb")
    with ServerProcess(model, tmp_path / "certs", tmp_path / "state", log=log, **flags) as server:
        config = write_run(tmp_path, model, server.port)
        preview = json.loads(
            cutlayer("preview", "--config", config, "--format", "json", cwd=tmp_path)
        )
        doctor = cutlayer("doctor", "--config", config, "--prove", cwd=tmp_path)
        printed = cutlayer("train", "--config", config, "--format", "json", cwd=tmp_path)
        trained = json.loads(printed[printed.index("{") :])
        cutlayer("merge", "--run", "out", "--output", "adapter", cwd=tmp_path)
        words = ("generate", "--config", config, "--prompt", "w20 w21 w22", "--max_new_tokens", 8)
        through_the_split = cutlayer(*words, cwd=tmp_path)
        with urlopen(f"{server.metrics}status.json") as told:  # our own server
            (tenant,) = json.loads(told.read())["tenants"]

    assert (tenant["name"], tenant["steps"]) == ("client", 3)
    assert all(json.loads(line)["level"] for line in (tmp_path / "log").read_text().splitlines())
    assert cutlayer("audit-log", "verify", "state/audit.jsonl", cwd=tmp_path)
    assert preview
    assert "equal" in doctor
    assert trained["steps"] == 3
    base = AutoModelForCausalLM.from_pretrained(model)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    words_in = tokenizer()("w20 w21 w22", return_tensors="pt")
    with torch.no_grad():
        out = stock.generate(**words_in, max_new_tokens=8, do_sample=False)
    told = tokenizer().decode(out[0, words_in["input_ids"].shape[1] :], skip_special_tokens=True)
    assert told.strip()
    assert told.strip() in through_the_split


def test_a_classifier_is_trained_by_the_command(folder_of: Any, tmp_path: Path, certs: Path):
    """`split_task: sequence-classification` trains a BERT whose adapter stock peft loads."""
    model = saved_tiny(folder_of, tmp_path, "bert", task="sequence-classification")
    labels = [0, 1, 2, 0, 2, 1, 1, 0]
    rows = [{"text": t, "label": n} for t, n in zip(dataset(8)["text"], labels, strict=True)]
    write_rows(tmp_path, rows)
    with ServerProcess(model, certs, tmp_path / "state", task="sequence-classification") as server:
        config = write_run(
            tmp_path,
            model,
            server.port,
            split_task="sequence-classification",
            split_ca=str(certs / "ca.pem"),
            split_cert=None,
            split_key=None,
        )
        cutlayer("train", "--config", config, cwd=tmp_path)

    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    stock = PeftModel.from_pretrained(base, tmp_path / "out")
    moved = [p for n, p in stock.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert len(moved) == sum("lora_B" in name for name, _ in stock.named_parameters())


BAD_RUNS = {
    "an unknown key": ({"split_bottom_layer": 1}, "did you mean split_bottom_layers"),
    "two faults at once": ({"max_step": 3, "split_chunk": 2}, "did you mean split_chunks"),
    "a wrong type": ({"max_steps": "many"}, "max_steps = 'many' is no whole number"),
    "no dataset": ({"dataset_name": None}, "dataset_name is missing"),
    "a missing dataset": ({"dataset_name": "nowhere.jsonl"}, "does not exist"),
    "a missing model": ({"model_name_or_path": "/nowhere"}, "/nowhere"),
    "no such layers": ({"split_bottom_layers": 5, "split_top_layers": 5}, "layers"),
    "too long samples": ({"max_length": 100_000}, "positions"),
    "nobody listens": ({"split_server": "127.0.0.1:1"}, "nothing listens"),
    "no LoRA": ({"use_peft": False}, "use_peft must be true"),
    "a missing certificate": ({"split_ca": "nowhere.pem"}, "nowhere.pem"),
    "an unknown task": ({"split_task": "classification"}, "one of causal-lm"),
    "no time at all": ({"split_idle_timeout_s": -5}, "must be a number of seconds above 0"),
    "no patience": ({"split_lease_s": float("nan")}, "split_lease_s = nan"),
    "no batch": ({"per_device_train_batch_size": 0}, "must be at least 1"),
    "a rate below 0": ({"learning_rate": -1.0}, "learning_rate = -1.0 must be"),
    "no steps": ({"max_steps": 0}, "train nothing"),
    "no epochs": ({"max_steps": -1, "num_train_epochs": 0}, "train nothing"),
    "a base in 4 bits": ({"load_in_4bit": True}, "split_quantization stores"),
    "a checkpoint by name": ({"resume_from_checkpoint": "out/checkpoint-1"}, "train --resume"),
    "what the trainer refuses": ({"padding_free": True}, "the trainer refuses this run"),
    "held-out rows that are trained on": ({"eval_strategy": "steps"}, "name a folder with"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_bad_run_ends_in_one_sentence(
    name: str, llama: Site, folder_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """`cutlayer train` says what is wrong and what to do, exits with a code and writes nothing."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    write_rows(tmp_path, [{"text": text} for text in dataset(8)["text"]])
    changed, words = BAD_RUNS[name]
    asked = {
        "split_ca": str(llama.certs / "ca.pem"),
        "split_cert": None,
        "split_key": None,
        **changed,
    }
    config = write_run(tmp_path, model, llama.server.port, **asked)

    assert one_sentence(["train", "--config", str(config)], capsys, words) in range(2, 9)
    assert not (tmp_path / "out").exists()


BAD_ROWS = {
    "no usable column": ([{"question": "w20", "answer": "w21"}] * 4, "it needs messages"),
    "a text left out": ([{"text": "w20 w21"}, {"text": None}], "row 1 of dataset"),
    "a number for a text": ([{"text": 5}] * 4, "text = '5': it must be text"),
    "no messages": ([{"messages": []}] * 4, "has no messages"),
    "messages of another kind": (
        [{"messages": [{"from": "user", "value": "w20"}]}] * 4,
        "must be a list of {role, content}",
    ),
    "a prompt left out": ([{"prompt": None, "completion": "w20"}] * 4, "has no prompt"),
    "no rows": ([], "no"),
    "no supervised token": (
        [{"prompt": "w20 w21 w22", "completion": " w23"}] * 3
        + [{"prompt": " ".join(f"w{i}" for i in range(20, 60)), "completion": " w60"}],
        "1 of 4 samples have no supervised token",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_end_in_one_sentence(
    name: str, llama: Site, folder_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A dataset that cannot be trained on is refused before the first step."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    rows, words = BAD_ROWS[name]
    write_rows(tmp_path, rows)
    config = write_run(
        tmp_path,
        model,
        llama.server.port,
        split_ca=str(llama.certs / "ca.pem"),
        split_cert=None,
        split_key=None,
    )

    assert one_sentence(["train", "--config", str(config)], capsys, words) in range(2, 9)


BAD_LABELS = {
    "names": (["a", "b"], "label = 'a': it must be the number of a class"),
    "one left out": ([0, None], "row 1 of dataset"),
    "below 0": ([0, -1], "label = '-1'"),
    "beyond the head": ([1, 2, 3], "label 3 and the head of"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_are_no_classes_end_in_one_sentence(
    name: str, folder_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Before the server is reached."""
    model = saved_tiny(folder_of, tmp_path, "bert", task="sequence-classification")
    labels, words = BAD_LABELS[name]
    texts = dataset(6)["text"]
    rows = [{"text": t, "label": labels[n % len(labels)]} for n, t in enumerate(texts)]
    write_rows(tmp_path, rows)
    config = write_run(tmp_path, model, 1, split_task="sequence-classification")

    assert one_sentence(["train", "--config", str(config)], capsys, words) == 3


def test_a_head_keeps_the_classes_that_the_data_has_not(folder_of: Any, tmp_path: Path):
    """Rows of two of three classes train a head of three; without a head, the greatest counts."""
    data, config = (
        {"label": [0, 1, 1]},
        AutoConfig.from_pretrained(
            saved_tiny(folder_of, tmp_path, "bert", task="sequence-classification")
        ),
    )

    assert classes_of(data, config, "m") == 3
    config.architectures = ["BertModel"]
    assert classes_of({"label": [0, 4]}, config, "m") == 5


BAD_FILES = {
    "a key twice": (b"max_steps: 1\nmax_steps: 2\n", "max_steps stands twice"),
    "no text": (b"\xff\xfe\x00", "no text in UTF-8"),
    "no keys": (b"- a\n- b\n", "list of 'key: value' lines"),
    "nothing": (b"", "list of 'key: value' lines"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_run_ends_in_one_sentence(name: str, tmp_path: Path, capsys: Any):
    """What YAML's loader would take, or could not read at all."""
    body, words = BAD_FILES[name]
    (tmp_path / "run.yaml").write_bytes(body)

    assert one_sentence(["train", "--config", str(tmp_path / "run.yaml")], capsys, words) == 2


def one_sentence(words: list[str], capsys: pytest.CaptureFixture[str], told: str) -> int:
    """Run a command that fails; return its exit code once its one sentence was read."""
    capsys.readouterr()
    code = main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if "cutlayer: " in line]
    assert len(lines) == 1
    assert told in lines[0]
    assert "Traceback" not in lines[0]
    return code
