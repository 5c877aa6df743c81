"""Read one YAML file: TRL's names as they are, ours under `split_`.

Deleting the `split_` lines leaves a valid TRL config. Every fault of a file is told at once, and
an unknown key with the nearest known name. No value names an import.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cutlayer.errors import ConfigError

__all__ = ["Run", "SplitConfig", "connect_settings", "fit", "lora_of", "read_run", "say"]

_TASKS = ("causal-lm", "sequence-classification")

# What `cli/privacy.py` makes defenses, a ledger and a transcript of.
_NOT_FOR_CONNECT = (
    "privacy_profile", "privacy", "defenses", "ledger", "budget", "budget_raised_by", "transcript",
    "dp_sgd", "public_text",
)  # fmt: skip


@dataclass(frozen=True)
class SplitConfig:
    """Our keys, without their prefix."""

    server: str
    """`host:port` of the server."""
    bottom_layers: int
    """First layers that stay here."""
    top_layers: int
    """Last layers that stay here."""
    ca: str | None = None
    """The authority that signed the server's certificate."""
    cert: str | None = None
    """Our certificate, for mutual TLS."""
    key: str | None = None
    """The key of our certificate."""
    token_file: str | None = None
    """A file with the bearer token by which the server knows us; CUTLAYER_TOKEN goes before it."""
    plaintext: bool = False
    """Use no TLS."""
    attestation_policy: str | None = None
    """What the server must prove before anything is sent to it, a JSON file."""
    codec: str | dict[str, str] = "raw"
    """How activations and gradients are written on the wire: one name, or names by departure."""
    chunks: int | str = 1
    """Micro-chunks of a training batch, or `auto`."""
    lean_head: bool = False
    """Run the LM head at labelled positions only."""
    quantization: str = ""
    """How the server's trunk is stored: `int8`, `float8`, or as its weights are."""
    send_once: bool = False
    """Have the server keep each row's activations, sealed, so that later epochs only name it."""
    train: list[str] | None = None
    """Parts on which the LoRA is; by default all that the privacy profile allows."""
    privacy_profile: str = "open"
    """`open`, `empirical`, `forward_only`, `formal` or `attested`."""
    privacy: dict[str, Any] = field(default_factory=dict)
    """Parameters of the profile's defenses: clip, epsilon, delta, planned, nsr, …"""
    defenses: list[dict[str, Any]] = field(default_factory=list)
    """Defenses by name with their parameters, in place of the profile's."""
    ledger: str | None = None
    """Where releases are booked; beside the data set by default."""
    budget: float | None = None
    """Epsilon that each record may spend in all; that of the defense by default."""
    budget_raised_by: str | None = None
    """Who decided on a budget above the one that the ledger holds."""
    dp_sgd: dict[str, Any] | None = None
    """Train by DP-SGD: target_epsilon, delta, clip, and total_epsilon of all adapters."""
    public_text: str | None = None
    """Text like one's own that is not one's own, for the attack that ends an adversarial run."""
    transcript: int = 0
    """How many sequences to record for the audit of the run."""
    gradient_checkpointing: bool = False
    """The trunk keeps layer inputs only."""
    run: str | None = None
    """Name of the run at the server; that of output_dir by default."""
    task: str = "causal-lm"
    """`causal-lm` or `sequence-classification`."""
    connect_timeout_s: float = 30.0
    """Seconds to reach the server."""
    idle_timeout_s: float = 120.0
    """Seconds without a byte after which the link is taken for dead."""
    lease_s: float = 600.0
    """Seconds for which a server that went away is tried again."""


@dataclass(frozen=True)
class Run:
    """One run as its file and flags describe it."""

    split: SplitConfig
    sft: Any
    """TRL's `SFTConfig`."""
    model: Any
    """TRL's `ModelConfig`."""
    data: Any
    """TRL's `ScriptArguments`."""


def read_run(path: str | Path, overrides: Mapping[str, str]) -> Run:
    """Read a run's YAML file, with flags in place of keys.

    Raises:
        ConfigError: Listing every unknown key, wrong type and missing key.
    """
    given = {**_yaml(Path(path)), **{key: _scalar(text) for key, text in overrides.items()}}
    from trl import ModelConfig, ScriptArguments, SFTConfig

    ours = {f"split_{f.name}": f for f in dataclasses.fields(SplitConfig)}
    homes = {name: cls for cls in (ScriptArguments, ModelConfig, SFTConfig) for name in _hints(cls)}
    faults: list[str] = []
    split: dict[str, Any] = {}
    trl: dict[type, dict[str, Any]] = {SFTConfig: {}, ModelConfig: {}, ScriptArguments: {}}
    for key, value in given.items():
        if key in ours:
            target, hint = split, _hints(SplitConfig)[key.removeprefix("split_")]
        elif key in homes:
            target, hint = trl[homes[key]], _hints(homes[key])[key]
        else:
            near = difflib.get_close_matches(key, [*ours, *homes], n=1)
            faults.append(f"{key} is unknown" + (f": did you mean {near[0]}?" if near else ""))
            continue
        try:
            target[key.removeprefix("split_") if key in ours else key] = fit(value, hint)
        except (TypeError, ValueError):
            faults.append(f"{key} = {value!r} is no {say(hint)}")
    faults += [
        f"{key} is missing"
        for key, f in ours.items()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and key not in given
    ]
    faults += ["model_name_or_path is missing"] if "model_name_or_path" not in given else []
    if faults:
        raise ConfigError(f"{path}: " + "; ".join(faults))
    try:
        run = Run(
            SplitConfig(**split),
            SFTConfig(**trl[SFTConfig]),
            ModelConfig(**trl[ModelConfig]),
            ScriptArguments(**trl[ScriptArguments]),
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if faults := [*_impossible(run), *_not_done(run)]:
        raise ConfigError(f"{path}: " + "; ".join(faults))
    return run


def _impossible(run: Run) -> list[str]:
    """Return a sentence for each value that no run can have."""
    split, sft = run.split, run.sft
    found = []
    if split.task not in _TASKS:
        found.append(f"split_task = {split.task!r} is unknown: one of {', '.join(_TASKS)}")
    for name in ("connect_timeout_s", "idle_timeout_s", "lease_s"):
        seconds = getattr(split, name)
        if not 0 < seconds < math.inf:
            found.append(f"split_{name} = {seconds!r} must be a number of seconds above 0")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(sft, name) < 1:
            found.append(f"{name} = {getattr(sft, name)} must be at least 1")
    if not 0 <= sft.learning_rate < math.inf:
        found.append(f"learning_rate = {sft.learning_rate!r} must be a number of at least 0")
    if sft.max_steps == 0 or (sft.max_steps < 0 and not 0 < sft.num_train_epochs < math.inf):
        found.append(
            f"max_steps = {sft.max_steps} and num_train_epochs = {sft.num_train_epochs} train "
            "nothing: one of them must be above 0"
        )
    return found


def _not_done(run: Run) -> list[str]:
    """Return a sentence for each key of TRL's that would be left undone in silence."""
    return [
        f"{name} is not done through the split: {instead}"
        for home, name, instead in (
            (run.model, "load_in_4bit", "split_quantization stores the server's trunk in 4 bits"),
            (run.model, "load_in_8bit", "split_quantization stores the server's trunk in 8 bits"),
            (run.model, "lora_target_parameters", "name modules in lora_target_modules"),
            (run.sft, "model_init_kwargs", "dtype, attn_implementation and such are keys"),
            (run.sft, "resume_from_checkpoint", "'cutlayer train --resume' goes on"),
        )
        if getattr(home, name, None)
    ]


class _Loader(yaml.SafeLoader):
    """Refuse a key that stands twice, of which YAML's own loader takes the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _value in node.value]
        twice = [key for key in keys if keys.count(key) > 1 and key != "<<"]
        if twice:
            raise yaml.MarkedYAMLError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506  a SafeLoader
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config '{path}' is no text in UTF-8: save it as such") from error
    except OSError as error:
        raise ConfigError(f"--config '{path}' cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise ConfigError(f"--config '{path}' is no YAML: {where}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"--config '{path}' must be a list of 'key: value' lines")
    return found


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def fit(value: Any, hint: Any) -> Any:
    """Return `value` as `hint` asks; numbers that YAML took for text (`1e-3`) become numbers."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value is None and (type(None) in options or Any in options):
        return None
    for option in options:
        kind = typing.get_origin(option) or option
        if _of_dicts(option) and type(value) is list and all(type(v) is dict for v in value):
            return value
        if _of_dicts(option):
            continue
        if kind in (bool, int, float, str, list, dict) and type(value) is kind:
            return value
        if kind not in (bool, int, float, str, list, dict, type(None)):
            return value  # an enum or the like: its own class judges it
    if float in options and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)
    if int in options and isinstance(value, str):
        return int(value)
    lists = [o for o in options if (typing.get_origin(o) or o) is list and not _of_dicts(o)]
    if lists and isinstance(value, str):
        return [value]
    if str in options and not isinstance(value, list | dict) and value is not None:
        return str(value)
    raise TypeError


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _of_dicts(hint: Any) -> bool:
    """Say whether it is a list of mappings."""
    return hint == list[dict[str, Any]]


def say(hint: Any) -> str:
    """Return a type in words, for a sentence about what is not of it."""
    if _of_dicts(hint):
        return "list of names with parameters, such as [{name: gaussian, nsr: 1.0}]"
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list"}
    return " or ".join(
        names.get(typing.get_origin(o) or o, str(o)) for o in options if o is not type(None)
    )


def lora_of(run: Run) -> Any:
    """Return the run's `LoraConfig`, `None` without `use_peft`."""
    from peft import LoraConfig, TaskType

    model = run.model
    if not model.use_peft:
        return None
    targets = model.lora_target_modules
    if isinstance(targets, list) and len(targets) == 1:
        targets = targets[0] if targets[0] == "all-linear" else targets
    kind = TaskType.SEQ_CLS if run.split.task == "sequence-classification" else TaskType.CAUSAL_LM
    return LoraConfig(
        task_type=kind,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=targets,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
    )


def connect_settings(run: Run) -> dict[str, Any]:
    """Return the keyword arguments of `connect` for a run."""
    from cutlayer.cli.privacy import defenses_of, parts_of

    split = {k: v for k, v in dataclasses.asdict(run.split).items() if k not in _NOT_FOR_CONNECT}
    folder = re.sub(r"[^A-Za-z0-9._-]", "-", Path(run.sft.output_dir).resolve().name)
    return {
        **split,
        # Not a key and no flag: a command line can be read by everybody on the machine.
        "token": os.environ.get("CUTLAYER_TOKEN") or None,
        "train": parts_of(run),
        "defenses": defenses_of(run),
        "send_once": run.split.send_once and str(Path(run.sft.output_dir) / "send_once"),
        "run": run.split.run or folder.lstrip("._-")[:64] or None,
        "model": run.model.model_name_or_path,
        "revision": None if run.model.model_revision == "main" else run.model.model_revision,
        "dtype": str(run.model.dtype or "float32"),
        "attn_implementation": run.model.attn_implementation,
        "peft_config": lora_of(run),
        "seed": run.sft.seed,
    }
