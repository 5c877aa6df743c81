"""Find a run's dataset and tokenizer, and refuse what cannot be trained on before it is tried."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cutlayer.cli.config import Run
from cutlayer.errors import ConfigError, CutlayerError, DataError, ModelError

__all__ = [
    "check_lengths",
    "check_supervised",
    "classes_of",
    "in_the_trainers_words",
    "load_split",
    "load_tokenizer",
]

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

# TRL's dataset formats, and text with a label for classification.
_COLUMNS = {
    "causal-lm": (("messages",), ("prompt", "completion"), ("text",)),
    "sequence-classification": (("text", "label"),),
}


def load_split(run: Run, split: str) -> Any:
    """Return one split of the run's dataset: a local file, a folder of files, or a hub name.

    Raises:
        DataError: If it is missing, empty, cannot be read, or has no column to train on.
        ConfigError: If no dataset is named.
    """
    from datasets import load_dataset

    name = run.data.dataset_name
    if not name:
        raise ConfigError("dataset_name is missing: name a JSONL, CSV or Parquet file or a hub set")
    path = Path(name)
    if path.is_dir():
        files = [f for f in sorted(path.iterdir()) if f.stem == split and f.suffix in _READERS]
        if not files:
            raise DataError(f"folder '{name}' has no {split}.jsonl, .csv or .parquet")
        path = files[0]
    elif path.is_file() and split != run.data.dataset_train_split:
        raise DataError(
            f"'{split}' of dataset '{name}' was asked for and it is one file, which is trained on: "
            f"name a folder with {run.data.dataset_train_split}{path.suffix} and "
            f"{split}{path.suffix}, or set eval_strategy to no"
        )
    local = path.is_file()
    if not local and (path.suffix in _READERS or path.is_absolute() or name.startswith(".")):
        raise DataError(f"dataset file '{name}' does not exist: check dataset_name")
    if local and path.suffix not in _READERS:
        raise DataError(f"dataset file '{path}' is none of {', '.join(_READERS)}")
    try:
        if local:
            data = load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        else:
            data = load_dataset(name, run.data.dataset_config, split=split)
    except Exception as error:  # each of the library's readers raises its own kinds
        cause = error.__cause__ or error  # what the reader itself said, and where
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        raise DataError(f"dataset '{name}' cannot be read ({reason})") from error
    if len(data) == 0:
        raise DataError(f"dataset '{name}' has no rows")
    wanted = _COLUMNS[run.split.task]
    if not any(set(columns) <= set(data.column_names) for columns in wanted):
        shapes = ", or ".join(" and ".join(columns) for columns in wanted)
        raise DataError(
            f"dataset '{name}' has the columns {', '.join(data.column_names)}: it needs {shapes}"
        )
    used = next(columns for columns in wanted if set(columns) <= set(data.column_names))
    for column in used:
        _check_column(name, data, column)
    return data


def _check_column(name: str, data: Any, column: str) -> None:
    """Refuse rows of which a trainer could make nothing.

    Raises:
        DataError: Naming the first.
    """
    fits, asked = _CELLS[column]
    for row, value in enumerate(data[column]):
        if value is None or value == []:
            raise DataError(
                f"row {row} of dataset '{name}' has no {column}: fill it in, or take the row out"
            )
        if not fits(value):
            raise DataError(
                f"row {row} of dataset '{name}' has {column} = {str(value)[:40]!r}: it must be "
                f"{asked}"
            )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_messages(value: Any) -> bool:
    return isinstance(value, str) or _are_messages(value)


def _is_class(value: Any) -> bool:
    return type(value) is int and value >= 0


_CELLS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "messages": (_are_messages, "a list of {role, content}"),
    "prompt": (_is_text_or_messages, "text, or a list of {role, content}"),
    "completion": (_is_text_or_messages, "text, or a list of {role, content}"),
    "text": (_is_text, "text"),
    "label": (_is_class, "the number of a class, from 0 up"),
}


def classes_of(data: Any, config: Any, name: str) -> int:
    """Return how many classes a classifier has: its head's, or those of the data.

    Raises:
        DataError: If the data has more than the head.
    """
    most = max(data["label"])
    is_trained = any(str(a).endswith("SequenceClassification") for a in config.architectures or ())
    if not is_trained:
        return most + 1
    if most >= config.num_labels:
        raise DataError(
            f"the data has label {most} and the head of '{name}' has {config.num_labels} classes, "
            "counted from 0: number the labels as the head does, or begin with a model without one"
        )
    return int(config.num_labels)


@contextlib.contextmanager
def in_the_trainers_words() -> Iterator[None]:
    """While open, what TRL's trainer refuses is a fault of the run, told in its own words.

    Raises:
        ConfigError: With them.
    """
    try:
        yield
    except CutlayerError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the trainer refuses this run ({what}): change what it names") from error


def load_tokenizer(run: Run) -> Any:
    """Return the model's tokenizer, with a pad token.

    Raises:
        ModelError: If there is none.
    """
    from transformers import AutoTokenizer

    name = run.model.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=run.model.model_revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model '{name}' has no tokenizer that can be loaded") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_lengths(run: Run, config: Any) -> None:
    """Refuse a `max_length` that the model's positions do not reach.

    Raises:
        ConfigError: With both numbers.
    """
    reach = getattr(config.get_text_config(), "max_position_embeddings", None)
    asked = run.sft.max_length
    if reach and (asked is None or asked > reach):
        raise ConfigError(
            f"max_length = {asked}: samples may be longer than the {reach} positions of "
            f"'{run.model.model_name_or_path}'; set max_length to {reach} or less"
        )


def check_supervised(rows: Any, *, of: int, packed: bool) -> None:
    """Refuse samples in which no token carries loss; the trainer would drop them in silence.

    Args:
        rows: The dataset as the trainer prepared it.
        of: How many samples it was made from.
        packed: Whether the trainer packed several samples into one row.

    Raises:
        DataError: With their number.
    """
    empty = [n for n, row in enumerate(rows) if all(x == -100 for x in row["labels"][1:])]
    dropped = 0 if packed else of - len(rows)
    if empty or dropped:
        first = f" (first: row {empty[0]})" if empty else ""
        raise DataError(
            f"{len(empty) + dropped} of {of} samples have no supervised token{first}: their answer "
            "is empty or was cut off; raise max_length, or take them out"
        )
