"""The model card that stands beside an adapter: what it was trained with, and what was sent."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cutlayer.cli.config import Run
from cutlayer.cli.dp import GUARANTEE_FILE
from cutlayer.cli.reattack import REATTACK_FILE, adversary_of
from cutlayer.errors import StorageError
from cutlayer.privacy.adapter_guarantee import up
from cutlayer.privacy.profiles import profile_of

__all__ = ["write_card"]


def write_card(folder: Path, settings: Run, trainer: Any, model: Any) -> None:
    """Write README.md into an adapter folder.

    Raises:
        StorageError: If it cannot be written.
    """
    split = dataclasses.asdict(settings.split)
    for secret in ("server", "ca", "cert", "key", "token_file", "attestation_policy"):
        split.pop(secret)
    if split["dp_sgd"] is None:
        (folder / GUARANTEE_FILE).unlink(missing_ok=True)  # of an earlier run in this folder
    if adversary_of(model) is None:
        (folder / REATTACK_FILE).unlink(missing_ok=True)
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
{_verdict(settings)} The cut is {model.cut}.{_reattacked(folder)}

## What a recipient of this adapter could learn

{_recipients(folder)}
"""
    try:
        (folder / "README.md").write_text(text)
    except OSError as error:
        raise StorageError(f"cannot write '{folder}/README.md' ({error.strerror})") from error


def _attested(model: Any) -> str:
    claims = model.connection.claims
    return f"\nThe server was {claims}, before anything was sent to it.\n" if claims else ""


def _verdict(settings: Run) -> str:
    name = settings.split.privacy_profile
    others = ", ".join(str(params.get("name")) for params in settings.split.defenses)
    if others:
        # The profile's words are about the profile's own defenses.
        return f"The defenses of this run were {others}: its audit says what they were worth."
    return f"Privacy profile `{name}`: {profile_of(name).verdict}."


def _recipients(folder: Path) -> str:
    file = folder / GUARANTEE_FILE
    if not file.is_file():
        return "Traces of the training data may be in these weights: no formal guarantee."
    found = json.loads(file.read_text())["against_recipients_of_the_adapter"]
    several = (
        f" This is adapter {found['adapters_of_this_data']} of this data; whoever has all of them: "
        f"epsilon {up(found['epsilon_of_all_of_them'])} at the same delta."
    )
    return f"{found['words']}{several if found['adapters_of_this_data'] > 1 else ''}"


def _reattacked(folder: Path) -> str:
    file = folder / REATTACK_FILE
    if not file.is_file():
        return ""
    found = json.loads(file.read_text())
    shares = "; ".join(
        f"{name} the run: "
        + ", ".join(f"{one['attack']} {one['trr']:.0%}" for one in found[name]["findings"])
        for name in ("before", "after")
    )
    return (
        f" Attacked anew once it was frozen, by one who has this adapter, the activations are "
        f"**{found['after']['verdict']}** (tokens read {shares}). No formal guarantee, and nothing "
        "is said of the gradients."
    )
