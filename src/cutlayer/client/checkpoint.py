"""Write and read one ordinary PEFT folder, whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cutlayer.errors import ModelError, StorageError

__all__ = ["PARTIAL_NOTE", "read_adapter", "write_adapter"]

ADAPTER_FILE = "adapter_model.safetensors"
PARTIAL_NOTE = "TRUNK_IS_AT_THE_SERVER"


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], config: LoraConfig, *, partial: bool
) -> None:
    """Write an adapter aside and move it into `folder`, beside what else stands there.

    Args:
        folder: Where the adapter goes; made if it does not exist.
        state: The adapter's tensors under the names of an adapter file.
        config: The LoRA of the whole model.
        partial: The trunk's half stays at the server; a note says so.

    Raises:
        StorageError: If the disk is full or cannot be written; what was there is untouched.
    """
    aside: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = tempfile.mkdtemp(prefix=".adapter-", dir=folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, Path(aside) / ADAPTER_FILE, metadata={"format": "pt"})
        was, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(aside)
        finally:
            config.inference_mode = was
        if partial:
            (Path(aside) / PARTIAL_NOTE).write_text(
                "The trunk's half of this adapter is kept by the server; use it with "
                "'cutlayer generate', through the split.\n"
            )
        for file in Path(aside).iterdir():
            file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"the adapter could not be written to '{folder}' ({reason}): free space or name "
            "another --output_dir; nothing there was changed"
        ) from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder.

    Raises:
        ModelError: If it is none, or cannot be read.
    """
    file = folder / ADAPTER_FILE
    if not (file.is_file() and (folder / "adapter_config.json").is_file()):
        raise ModelError(f"'{folder}' is no adapter folder: it lacks {ADAPTER_FILE}")
    try:
        json.loads((folder / "adapter_config.json").read_text())
        state: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"adapter '{folder}' cannot be read ({error}): save it again") from error
    return state
