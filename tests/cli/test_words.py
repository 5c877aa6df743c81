"""Arguments that make no sense, each refused in one sentence before anything is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.card import _recipients
from cutlayer.cli.main import main
from tests.cli.test_by_hand import one_sentence, saved_tiny, write_rows, write_run
from tests.tokens import dataset

SERVE = ["serve", "--model_name_or_path", "m", "--split_bottom_layers", "1"]
SERVE += ["--split_top_layers", "1", "--certs", "certs"]
GENERATE = ["generate", "--config", "run.yaml", "--prompt", "w20"]

BAD = {
    "a port below 0": ([*SERVE, "--port", "-1"], "--port -1: a port is from 0 to 65535"),
    "a port of five nines": ([*SERVE, "--metrics_port", "99999"], "--metrics_port 99999"),
    "a device that is none": ([*SERVE, "--device", "gpu"], "--device 'gpu' cannot be used here"),
    "threads below 1": ([*SERVE, "--threads", "-2"], "--threads -2: it must be at least 1"),
    "a host with its port": (["certs", "init", "--host", "gpu.org:7443"], "without https:// and"),
    "a page for a host": (["certs", "init", "--host", "https://gpu.org"], "without https:// and"),
    "a host of two words": (["certs", "init", "--host", "a b"], "no name and no address"),
    "a client elsewhere": (["certs", "client", "--name", "../evil"], "'../evil' is no plain name"),
    "a client without a name": (["certs", "init", "--client", ""], "'' is no plain name"),
    "a link of no width": (
        ["preview", "--config", "run.yaml", "--bandwidth_mbit", "0"],
        "--bandwidth_mbit 0 a number above 0",
    ),
    "samples below 0": (["preview", "--config", "run.yaml", "--samples", "-1"], "--samples -1"),
    "no warmth": ([*GENERATE, "--temperature", "-1"], "--temperature -1 a number of at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_numbers_and_names_that_cannot_be(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """The flag is named with its value, and nothing was written."""
    monkeypatch.chdir(tmp_path)
    words, told = BAD[name]

    assert one_sentence(words, capsys, told) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["gpu.example.org", "*.example.org", "10.0.0.1", "::1", "gpu_1"])
def test_hosts_that_can_be(host: str, tmp_path: Path):
    """Names, one with a star, and addresses of both kinds."""
    assert main(["certs", "init", "--dir", str(tmp_path / "certs"), "--host", host]) == 0


def test_a_token_is_printed_where_the_user_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """A container runs under a number: the tenant is added, and its token must not be lost."""

    def nobody() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr("getpass.getuser", nobody)
    state = tmp_path / "state"

    assert main(["tenants", "add", "ward-a", "--state_dir", str(state)]) == 0
    assert capsys.readouterr().out.startswith("cutlayer_")
    assert '"uid ' in (state / "audit.jsonl").read_text()


def test_a_token_is_made_only_where_it_can_be_logged(tmp_path: Path, capsys: Any):
    """An audit log that cannot be opened is told before there is a token that nobody sees."""
    state = tmp_path / "state"
    words = ["tenants", "add", "ward-a", "--state_dir", str(state)]

    assert one_sentence([*words, "--audit_log", str(tmp_path)], capsys, "audit log") == 8
    assert main(words) == 0


def test_a_preview_tells_what_the_trainer_refuses(folder_of: Any, tmp_path: Path, capsys: Any):
    """As `train` does."""
    write_rows(tmp_path, [{"text": text} for text in dataset(4)["text"]])
    model = saved_tiny(folder_of, tmp_path, "llama")
    config = write_run(tmp_path, model, 1, padding_free=True)

    assert one_sentence(["preview", "--config", str(config)], capsys, "the trainer refuses") == 2


def test_a_preview_shows_as_many_samples_as_are_asked_for(
    folder_of: Any, tmp_path: Path, capsys: Any
):
    """Not eight at most."""
    write_rows(tmp_path, [{"text": text} for text in dataset(12)["text"]])
    config = write_run(tmp_path, saved_tiny(folder_of, tmp_path, "llama"), 1)

    words = ["preview", "--config", str(config), "--samples", "10", "--format", "json"]
    assert main(words) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 10


def test_a_card_rounds_epsilon_up(tmp_path: Path):
    """A promise is never printed smaller than it is, that of several adapters neither."""
    found = {"words": "", "adapters_of_this_data": 2, "epsilon_of_all_of_them": 8.0004}
    body = json.dumps({"against_recipients_of_the_adapter": found})
    (tmp_path / "guarantee.json").write_text(body)

    assert "epsilon 8.01 at the same delta" in _recipients(tmp_path)
