"""The model card that stands beside an adapter: what it was trained with, and what was sent."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cutlayer.cli.config import Run
from cutlayer.errors import StorageError

__all__ = ["write_card"]


def write_card(folder: Path, settings: Run, trainer: Any, model: Any) -> None:
    """Write README.md into an adapter folder.

    Raises:
        StorageError: If it cannot be written.
    """
    split = dataclasses.asdict(settings.split)
    for secret in ("server", "ca", "cert", "key", "token_file", "attestation_policy"):
        split.pop(secret)
    traffic, sft, lora = model.connection.traffic, settings.sft, model.plan.config
    library = "\n".join(
        f"- {name} {version(name)}" for name in ("cutlayer", "transformers", "peft", "torch")
    )
    kept = (
        "\nThe trunk's half of this adapter is kept by the server; this folder is not whole.\n"
        if model.keeps_adapter
        else ""
    )
    text = f"""---
base_model: {settings.model.model_name_or_path}
library_name: peft
tags: [lora, split-learning, cutlayer]
---

# LoRA of {Path(settings.model.model_name_or_path).name}

An ordinary PEFT adapter, trained through a split: layers {model.cut} of {model.anatomy.num_layers}
ran at a server, the others at the owner of the data.
{kept}
## Trained with

- LoRA: r={lora.r}, alpha={lora.lora_alpha}, dropout={lora.lora_dropout}
- {trainer.state.global_step} steps, batch {sft.per_device_train_batch_size} x \
{sft.gradient_accumulation_steps}, learning rate {sft.learning_rate}, {sft.optim}, seed {sft.seed}
- split: {", ".join(f"{key}={value}" for key, value in split.items())}
- sent up {traffic.sent_bytes} bytes, received {traffic.received_bytes} bytes
{library}

## What the server could read
{_attested(model)}
The server received the activations of every training sample at layer {model.cut.lower} and the
gradients at layer {model.cut.upper}. With public base weights the text and the labels can be
computed back from them. No formal guarantee of privacy was in force.
"""
    try:
        (folder / "README.md").write_text(text)
    except OSError as error:
        raise StorageError(f"cannot write '{folder}/README.md' ({error.strerror})") from error


def _attested(model: Any) -> str:
    claims = model.connection.claims
    return f"\nThe server was {claims}, before anything was sent to it.\n" if claims else ""
