"""Checkpoints of both halves on one step: both are there, or the checkpoint does not count.

    1. the server saves its half under the step        (beside the older ones)
    2. the trainer writes its own folder               checkpoint-<step>
    3. that folder gets a commit record, last, synced  cutlayer.json
    4. older folders go, as save_total_limit says, and then the server's halves of them

Killed anywhere in between, the last folder with a record is whole on both sides.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from cutlayer.client.model import SplitModel
from cutlayer.errors import Refused, StorageError
from cutlayer.wire import cutlayer_pb2 as pb

__all__ = ["RECORD", "keep_both_halves", "load_both_halves", "newest_checkpoint"]

log = logging.getLogger(__name__)

RECORD = "cutlayer.json"


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return the last checkpoint that is whole on both sides, `None` if there is none."""
    whole = [folder for folder in _folders(output_dir) if (folder / RECORD).is_file()]
    return max(whole, key=_step_of, default=None)


def keep_both_halves(trainer: Any, model: SplitModel) -> None:
    """Have a trainer's checkpoints saved on both sides, and its resume pick a whole one."""
    save, train, load_best = trainer._save_checkpoint, trainer.train, trainer._load_best_model

    def saving(*args: Any, **kwargs: Any) -> None:
        step, limit = trainer.state.global_step, trainer.args.save_total_limit
        folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            model.connection.request(pb.Head(save_state=pb.SaveState(step=step))).wait()
        except StorageError as error:
            log.warning("checkpoint %d was not saved: %s", step, error)
            return
        trainer.args.save_total_limit = None  # nothing older goes before this one is whole
        try:
            (folder / RECORD).unlink(missing_ok=True)
            save(*args, **kwargs)
            found = {"chunks": model.tuning.found} if model.tuning else {}
            _commit(folder, {"run": model.connection.run, "step": step, **found})
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_of_storage(error):
                raise
            # The run is worth more than this checkpoint: go on, and the next one may succeed.
            shutil.rmtree(folder, ignore_errors=True)
            log.warning("checkpoint %d was not saved: %s", step, error)
            return
        finally:
            trainer.args.save_total_limit = limit
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(
            output_dir=trainer.args.output_dir, save_total_limit=limit, best_model_checkpoint=best
        )
        steps = [_step_of(kept) for kept in _folders(Path(trainer.args.output_dir))]
        model.connection.request(pb.Head(retain=pb.Retain(steps=steps)), unattended=True)

    def training(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(Path(trainer.args.output_dir))
            resume_from_checkpoint = str(newest) if newest else None
            if newest is None:
                log.warning("there is no checkpoint yet that both sides hold: beginning at step 0")
        model.resumes_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return train(resume_from_checkpoint, *args, **kwargs)

    def loading_best() -> None:
        load_best()
        if model.keeps_adapter:  # the folder has our half alone
            best = Path(trainer.state.best_model_checkpoint)
            _load_trunk(model, best / RECORD, _step_of(best))

    trainer._save_checkpoint, trainer.train = saving, training
    trainer._load_best_model = loading_best


def load_both_halves(trainer: Any, model: SplitModel, step: int) -> None:
    """Have the server go back to the step that a trainer resumes at.

    Raises:
        Refused: If the server does not hold it.
    """
    beside = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    _load_trunk(model, (model.resumes_from or beside) / RECORD, step)


def _load_trunk(model: SplitModel, record: Path, step: int) -> None:
    run = ""  # the record's may be another
    if record.is_file():
        told = json.loads(record.read_text())
        run = str(told.get("run", ""))
        if model.tuning and told.get("chunks"):
            model.tuning.fix(int(told["chunks"]))  # another number would round otherwise
    head = pb.Head(load_state=pb.LoadState(step=step, run=run))
    model.connection.request(head).wait()
    model.remote_trunk.step = step


def _commit(folder: Path, record: dict[str, Any]) -> None:
    """Sync all files of a checkpoint, then give it its record."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    aside = folder / f".{RECORD}"
    aside.write_text(json.dumps(record))
    _sync(aside)
    aside.replace(folder / RECORD)
    _sync(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _is_of_storage(error: Exception) -> bool:
    # torch.save tells of a full disk with a RuntimeError of its own.
    if isinstance(error, Refused):
        return False
    return not isinstance(error, RuntimeError) or "PytorchStreamWriter" in str(error)


def _folders(output_dir: Path) -> list[Path]:
    found = output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [folder for folder in found if folder.name.rpartition("-")[2].isdigit()]


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
