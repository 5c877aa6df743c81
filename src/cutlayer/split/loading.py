"""Load one part of a model: neither side reads, downloads or holds the weights of the other.

The model class builds itself on `meta` inside `from_pretrained` (transformers 5), so a subclass
that prunes itself at the end of `__init__` leaves only its own keys to be read. `from_pretrained`
does the reading, so its key conversions, tied weights and dtypes are Hugging Face's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _get_model_class

from cutlayer.errors import CannotCut, ConfigError, ModelError
from cutlayer.split.cut import Anatomy, Cut, anatomy_of, keep_ends, keep_trunk, refuse_by_name

__all__ = [
    "TASKS",
    "Checkpoint",
    "Skeleton",
    "load_ends",
    "load_trunk",
    "open_checkpoint",
    "skeleton_of",
]

TASKS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What two sides may set differently without the trunk being another: names, heads, token ids.
_OWN_AFFAIR = re.compile(
    r"^(_.*|transformers_version|dtype|torch_dtype|architectures|vocab_size|id2label|label2id|"
    r"num_labels|problem_type|use_cache|.*_token_id|.*dropout.*|.*_pdrop|return_dict|output_.*)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, found but not read."""

    name: str
    """What the user called it: a folder or a hub id."""
    revision: str
    """The commit on the hub, or empty for a folder."""
    config: PreTrainedConfig
    keys: dict[str, str]
    """The file of every tensor."""
    fetch: Callable[[str], Path]
    """Return a file's path on this machine, downloading it if need be."""


@dataclass(frozen=True)
class Skeleton:
    """The whole model without memory: what it would be, and where it can be cut."""

    model: PreTrainedModel
    anatomy: Anatomy
    task: str
    """`causal-lm` or `sequence-classification`."""


def open_checkpoint(name: str, *, revision: str | None = None) -> Checkpoint:
    """Find a model in a folder or on the hub, and read its config and its index.

    Raises:
        ModelError: If there is no such model, or it has no safetensors weights.
        CannotCut: If its family is refused.
    """
    folder = Path(name)
    if folder.is_dir():
        fetch: Callable[[str], Path] = lambda file: folder / file
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder '{name}' does not exist: check --model_name_or_path")
    else:
        fetch = lambda file: Path(hf_hub_download(name, file, revision=revision))
    try:
        config = AutoConfig.from_pretrained(fetch("config.json").parent)
        refuse_by_name(config)
        keys = _keys(fetch, local=folder.is_dir())
    except CannotCut:
        raise
    except (EntryNotFoundError, SafetensorError, FileNotFoundError, ValueError, KeyError) as error:
        raise ModelError(
            f"'{name}' is not a model with config.json and safetensors weights "
            f"({_first_line(error)}): name a folder that save_pretrained wrote, or a hub id"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model '{name}' is no folder here and could not be fetched from the hub "
            f"({_first_line(error)}): check --model_name_or_path and the network"
        ) from error
    commit = getattr(config, "_commit_hash", None) or ""
    if not folder.is_dir() and not commit:
        commit = fetch("config.json").parent.name
    return Checkpoint(name, commit, config, keys, fetch)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _keys(fetch: Callable[[str], Path], *, local: bool) -> dict[str, str]:
    if not local or fetch(INDEX).exists():
        try:
            with fetch(INDEX).open() as file:
                weight_map: dict[str, str] = json.load(file)["weight_map"]
            return weight_map
        except (EntryNotFoundError, FileNotFoundError):
            pass
    with safe_open(fetch(SINGLE), framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def model_class(config: PreTrainedConfig, task: str) -> type[PreTrainedModel]:
    """Return the class that transformers uses for this config and task.

    Raises:
        ConfigError: If the task is unknown.
        CannotCut: If transformers has no such class.
    """
    if task not in TASKS:
        raise ConfigError(f"task '{task}' is unknown: one of {', '.join(TASKS)}")
    try:
        cls: type[PreTrainedModel] = _get_model_class(config, TASKS[task])
    except KeyError:
        raise CannotCut(
            f"models of type '{config.model_type}' have no class for {task} in transformers"
        ) from None
    return cls


def skeleton_of(config: PreTrainedConfig, task: str) -> Skeleton:
    """Build the whole model on `meta` and look where it can be cut.

    Raises:
        CannotCut: If it cannot.
    """
    with torch.device("meta"):
        model = model_class(config, task)(config)
    return Skeleton(model, anatomy_of(model), task)


def load_ends(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    cut: Cut,
    remote: nn.Module,
    **settings: Any,
) -> PreTrainedModel:
    """Load the client's part, with `remote` where the trunk would be.

    Args:
        checkpoint: Where the weights are.
        skeleton: The whole model on `meta`.
        cut: Where to cut.
        remote: Called in place of layers[cut.lower:cut.upper].
        settings: Handed to `from_pretrained` (`dtype`, `attn_implementation`).

    Raises:
        ModelError: If weights of this part are missing.
        ConfigError: If the family does not know one of the settings.
    """
    ends = set(range(skeleton.anatomy.num_layers)) - set(range(cut.lower, cut.upper))

    def prune(model: PreTrainedModel) -> None:
        keep_ends(model, skeleton.anatomy, cut, remote)

    return _load(checkpoint, skeleton, prune, ends, ends_too=True, **settings)


def load_trunk(
    checkpoint: Checkpoint, skeleton: Skeleton, cut: Cut, **settings: Any
) -> PreTrainedModel:
    """Load the server's part. Arguments and errors are those of `load_ends`."""

    def prune(model: PreTrainedModel) -> None:
        keep_trunk(model, skeleton.anatomy, cut)
        model.all_tied_weights_keys = {}  # both ends of every tie are elsewhere

    trunk = set(range(cut.lower, cut.upper))
    return _load(checkpoint, skeleton, prune, trunk, ends_too=False, **settings)


def _load(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    prune: Callable[[PreTrainedModel], None],
    layers: set[int],
    *,
    ends_too: bool,
    **settings: Any,
) -> PreTrainedModel:
    cls: Any = type(skeleton.model)

    class Part(cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            prune(self)
            self._keys_to_ignore_on_load_unexpected = {".*"}

        def _init_weights(self, module: nn.Module) -> None:
            # A family may want to start its head's weights anew; at the server there is no head.
            with suppress(AttributeError):
                super()._init_weights(module)

    # transformers reads the class's name and module, among others to convert older key names.
    Part.__name__, Part.__module__ = cls.__name__, cls.__module__
    with _files_of_part(checkpoint, skeleton.anatomy, layers, ends_too=ends_too) as folder:
        try:
            model, info = Part.from_pretrained(folder, output_loading_info=True, **settings)
        except ValueError as error:
            raise ConfigError(
                f"'{checkpoint.name}' cannot be loaded with these settings ({_first_line(error)}): "
                "check --attn_implementation and --dtype"
            ) from error
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(
                f"the weights of '{checkpoint.name}' cannot be read ({_first_line(error)}): "
                "fetch the model again"
            ) from error
    missing = sorted(info["missing_keys"])
    if missing and not _are_a_new_head(model, missing):
        raise ModelError(
            f"'{checkpoint.name}' lacks {len(missing)} weights of this part ({missing[0]}, …): "
            "it is incomplete or of another architecture than its config.json says"
        )
    model.__class__ = cls
    model.name_or_path = model.config._name_or_path = checkpoint.name
    loaded: PreTrainedModel = model
    return loaded


def _are_a_new_head(model: PreTrainedModel, missing: list[str]) -> bool:
    """Say whether only a classification head is missing, which every fine-tuning makes anew."""
    inside = model.base_model_prefix + "."
    heads = [key for key in missing if not key.startswith(inside) or "pooler" in key]
    if heads != missing or not type(model).__name__.endswith("ForSequenceClassification"):
        return False
    logging.getLogger(__name__).info("the classification head is new: %s", ", ".join(missing))
    return True


@contextmanager
def _files_of_part(
    checkpoint: Checkpoint, anatomy: Anatomy, layers: set[int], *, ends_too: bool
) -> Iterator[str]:
    """Yield a folder in which only the files of this part stand."""
    number_of = _layer_number(anatomy)
    # A checkpoint of older key names may call its layers otherwise: then any file may be needed.
    known = any(number_of(key) is not None for key in checkpoint.keys)
    keys = {
        key: file
        for key, file in checkpoint.keys.items()
        if not known or number_of(key) in layers or (number_of(key) is None and ends_too)
    }
    with tempfile.TemporaryDirectory(prefix="cutlayer-") as made:
        folder = Path(made)
        for file in sorted({"config.json", *keys.values()}):
            (folder / file).symlink_to(checkpoint.fetch(file).resolve())
        generation = _optional(checkpoint, "generation_config.json")
        if generation:
            (folder / generation.name).symlink_to(generation.resolve())
        if set(keys.values()) != {SINGLE}:
            index = {"metadata": {"total_size": 0}, "weight_map": keys}
            (folder / INDEX).write_text(json.dumps(index))
        yield made


def _optional(checkpoint: Checkpoint, file: str) -> Path | None:
    try:
        path = checkpoint.fetch(file)
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return path if path.exists() else None


def _layer_number(anatomy: Anatomy) -> Callable[[str], int | None]:
    """Return a function from a tensor's name in a checkpoint to its layer, `None` for the ends."""
    # Checkpoints may lack the base model's prefix (GPT-2: "h.0." for "transformer.h.0.").
    pattern = re.compile(rf"(?:^|\.){re.escape(anatomy.layers_path.rpartition('.')[2])}\.(\d+)\.")

    def number_of(key: str) -> int | None:
        found = pattern.search(key)
        return int(found.group(1)) if found else None

    return number_of


def config_digest(config: PreTrainedConfig) -> str:
    """Return a digest of everything in a config that shapes the trunk."""

    def shaping(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: shaping(v) for k, v in sorted(value.items()) if not _OWN_AFFAIR.match(k)}
        return value

    text = json.dumps(shaping(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def layer_digests(
    checkpoint: Checkpoint, anatomy: Anatomy, cut: Cut, *, trunk: bool
) -> dict[int, str]:
    """Return a digest of each layer that stands in the files which this side opens anyway.

    Of every tensor its name, shape, stored dtype and first row are taken: enough to tell another
    fine-tune, cheap enough to do at every start.
    """
    number_of = _layer_number(anatomy)
    mine = {
        file
        for key, file in checkpoint.keys.items()
        if ((number := number_of(key)) is not None and number in cut) is trunk
    }
    by_layer: dict[int, list[str]] = {}
    for key in sorted(checkpoint.keys):
        number = number_of(key)
        if number is not None:
            by_layer.setdefault(number, []).append(key)
    whole = {n: keys for n, keys in by_layer.items() if {checkpoint.keys[k] for k in keys} <= mine}
    digests = {number: hashlib.sha256() for number in whole}
    for file in sorted({checkpoint.keys[k] for keys in whole.values() for k in keys}):
        with safe_open(checkpoint.fetch(file), framework="pt") as opened:
            for number, keys in whole.items():
                for key in keys:
                    if checkpoint.keys[key] == file:
                        digests[number].update(_sample(opened, key))
    return {number: digest.hexdigest()[:32] for number, digest in digests.items()}


def _sample(opened: Any, key: str) -> bytes:
    part = opened.get_slice(key)
    shape = part.get_shape()
    row = part[0:1] if shape else opened.get_tensor(key)
    if len(shape) == 1:
        row = part[:]
    head = f"{key} {shape} {part.get_dtype()} ".encode()
    return head + row.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
