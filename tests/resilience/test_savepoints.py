"""Checkpoints are of both halves or of none, and a run that goes on from one is the calm run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from benchmarks.proxy import Proxy
from cutlayer.cli.main import main
from cutlayer.client.savepoints import RECORD, newest_checkpoint
from cutlayer.errors import StorageError
from tests.cli.test_by_hand import saved_tiny, write_rows, write_run
from tests.equivalence.test_trl import stop_after, trainer_of
from tests.site import ServerProcess, Site, adapter_of, batch_of, equal, site_of
from tests.tokens import dataset

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}


def checkpoints(folder: Path) -> list[int]:
    """Return the steps of a trainer's checkpoint folders."""
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def held(site: Site, run: str) -> list[int]:
    """Return the steps that the server holds of a run."""
    sessions = site.server.sessions  # type: ignore[union-attr]
    sessions.on_trunk(lambda: None, "default").result()  # after what was asked without waiting
    return sessions._store.steps("default", run)


def test_both_sides_keep_the_same_steps(llama: Site, tmp_path: Path):
    """`save_total_limit` holds at the client and at the server."""
    with llama.connect(run="limited") as split:
        trainer_of(split, tmp_path, **SAVING, save_total_limit=2).train()
        here = checkpoints(tmp_path)
        with torch.no_grad():
            split.whole_adapter()  # its reply comes after the last request's

        assert here == [6, 8]
        assert held(llama, "limited") == here
    assert all((tmp_path / f"checkpoint-{step}" / RECORD).is_file() for step in here)


def test_a_half_written_checkpoint_does_not_count(llama: Site, tmp_path: Path):
    """What lacks its record is passed over, and the run ends as if it had not been there."""
    with llama.connect(run="calm") as split:
        trainer_of(split, tmp_path / "calm", **SAVING).train()
        calm = adapter_of(split)
    with llama.connect(run="torn") as split:
        trainer = trainer_of(split, tmp_path / "torn", **SAVING)
        stop_after(trainer, 4)
        trainer.train()
    torn = tmp_path / "torn" / "checkpoint-6"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")

    assert newest_checkpoint(tmp_path / "torn") == tmp_path / "torn" / "checkpoint-4"
    with llama.connect(run="another-name") as split:
        trainer = trainer_of(split, tmp_path / "torn", **SAVING)
        trainer.train(resume_from_checkpoint=True)
        assert equal(calm, adapter_of(split))


def test_a_checkpoint_of_another_folder_is_the_same_on_both_sides(llama: Site, tmp_path: Path):
    """Whose path is given is resumed, though the run's own folder has one of that step."""
    for name, settings in (("mine", {}), ("theirs", {"learning_rate": 3e-3})):
        with llama.connect(run=f"{name}-elsewhere") as split:
            trainer_of(split, tmp_path / name, **SAVING, **settings).train()
            ended = adapter_of(split)
    theirs = {**SAVING, "learning_rate": 3e-3}

    with llama.connect(run="mine-elsewhere") as split:
        trainer = trainer_of(split, tmp_path / "mine", **theirs)
        trainer.train(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-4"))
        assert equal(ended, adapter_of(split))


@pytest.mark.parametrize("keep_adapter", [False, True])
def test_the_best_checkpoint_is_the_best_on_both_sides(
    llama: Site, certs: Path, tmp_path: Path, keep_adapter: bool
):
    """`load_best_model_at_end` goes back to one step here and there, whoever keeps the adapter."""
    best = {
        **SAVING,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that it is the first and not the last
    }
    whole, site = llama.unsplit(), site_of(llama.folder, certs, tmp_path, keep_adapter=keep_adapter)
    trainer = trainer_of(whole, tmp_path / "whole", **best)
    trainer.train()
    with torch.no_grad():
        expected = whole.eval()(**batch_of(5)).logits

    with site.connect() as split:
        trainer_of(split, tmp_path / "split", **best).train()
        with torch.no_grad():
            found = split.eval()(**batch_of(5)).logits
    site.server.stop(grace_s=0.5)

    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert equal(expected, found)


def test_a_resumed_run_outlives_the_checkpoint_it_began_from(
    llama: Site, certs: Path, tmp_path: Path
):
    """When the server is lost after that checkpoint was dropped, nothing is missing."""
    saving = {**SAVING, "save_total_limit": 1}
    with llama.connect(run="calm-limited") as split:
        trainer_of(split, tmp_path / "calm", **saving).train()
        calm = adapter_of(split)
    with lost_and_found(llama, certs, tmp_path / "state") as (address, lose):
        with llama.connect(server=address, run="rough") as split:
            trainer = trainer_of(split, tmp_path / "rough", **saving)
            stop_after(trainer, 2)
            trainer.train()
        with llama.connect(server=address, run="rough", lease_s=30.0) as split:
            trainer = trainer_of(split, tmp_path / "rough", **saving)
            trainer.add_callback(At(7, lose))
            trainer.train(resume_from_checkpoint=True)
            rough = adapter_of(split)

    assert equal(calm, rough)


class At(TrainerCallback):
    """Do something at the end of one step."""

    def __init__(self, step: int, do: Callable[[], None]) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Do it at that step."""
        if state.global_step == self.step:
            self.do()


@contextlib.contextmanager
def lost_and_found(
    llama: Site, certs: Path, state: Path
) -> Iterator[tuple[str, Callable[[], None]]]:
    """A server behind an address, and how to lose its memory and have another in its place."""
    sites = [site_of(llama.folder, certs, state)]
    proxy = Proxy(sites[0].server.port)

    def lose() -> None:
        old: Any = sites[-1].server
        old.grpc_server.stop(0).wait()
        old.sessions._stopping.set()
        sites.append(site_of(llama.folder, certs, state))
        proxy.target = sites[-1].server.port
        proxy.cut()

    yield f"127.0.0.1:{proxy.port}", lose
    proxy.close()
    sites[-1].server.stop(0)


@pytest.mark.parametrize("where", ["server", "client"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    llama: Site, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
):
    """A checkpoint that cannot be written is told of and left out; older ones stay."""
    full = {4, 6}

    def refuse(step: int) -> None:
        if step in full:
            raise OSError(28, "No space left on device")

    with llama.connect(run=f"full-{where}") as split:
        trainer = trainer_of(split, tmp_path, **SAVING)
        if where == "client":
            rng = trainer._save_rng_state
            monkeypatch.setattr(
                trainer,
                "_save_rng_state",
                lambda folder: (refuse(trainer.state.global_step), rng(folder)),
            )
        else:
            store = llama.server.sessions._store  # type: ignore[union-attr]
            write = type(store)._write

            def full_disk(self: Any, home: Path, name: str, state: Any) -> None:
                if name.startswith("step-") and state.step in full:
                    raise StorageError("the server could not save (No space left on device)")
                write(self, home, name, state)

            monkeypatch.setattr(type(store), "_write", full_disk)
        trainer.train()
        finished = trainer.state.global_step

    assert finished == 8
    assert checkpoints(tmp_path) == [2, 8]


def test_a_killed_client_goes_on_with_resume(folder_of: Any, tmp_path: Path, certs: Path):
    """SIGKILL, Ctrl-C and `--resume` end in the very adapter of a calm run."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    write_rows(tmp_path, [{"text": text} for text in dataset(24)["text"]])
    common = {
        "split_ca": str(certs / "ca.pem"),
        "split_cert": None,
        "split_key": None,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 400,
        "lora_dropout": 0.2,
        "split_chunks": 2,
        "lr_scheduler_type": "constant",  # how long the run is shall not matter
    }
    with ServerProcess(model, certs, tmp_path / "state") as server:
        config = write_run(tmp_path, model, server.port, **common)
        first = started(config, tmp_path)
        until(lambda: len(checkpoints(tmp_path / "out")) > 1)
        first.kill()
        first.wait()
        killed_at = newest_checkpoint(tmp_path / "out")
        second = started(config, tmp_path, "--resume")
        until(lambda: newest_checkpoint(tmp_path / "out") != killed_at)
        second.send_signal(signal.SIGINT)
        printed, _ = second.communicate(timeout=120)
        stopped = json.loads(printed[printed.index("{") :])["stopped_at_step"]
        total = stopped + 3
        finish = write_run(tmp_path, model, server.port, **common | {"max_steps": total})
        assert main(["train", "--config", str(finish), "--resume", "--threads", "1"]) == 0
        calm = {**common, "max_steps": total, "output_dir": str(tmp_path / "calm")}
        config = write_run(tmp_path, model, server.port, **calm)
        assert main(["train", "--config", str(config), "--threads", "1"]) == 0

    assert second.returncode == 130
    rough = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert equal(load_file(tmp_path / "calm" / "adapter_model.safetensors"), rough)


def started(config: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Begin `cutlayer train`."""
    command = [sys.executable, "-m", "cutlayer.cli.main", "train", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--threads", "1", "--format", "json", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def until(is_so: Any, *, within_s: float = 120.0) -> None:
    """Wait for something."""
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
