"""What really left the client, as the server has it: kept at the client, for the audit.

    <folder>/head.json                 the run's facts, the number of lines and the chain's end
    <folder>/index.jsonl               a line per file: what it is, its digest, the line before's
    <folder>/000001-activations.safetensors   what went up, after defense and codec, and the masks
    <folder>/000002-truth.safetensors         the tokens and labels, which were never sent
    <folder>/000003-trunk_out.safetensors     the server's answer, which it knows as well
    <folder>/000004-gradient.safetensors      the gradient at the upper cut, if one left

Tensors are recorded after every defense and as the server decodes them. The lines are chained by
SHA-256, from the facts on, and counted in the head, so that a missing, changed or added one is
seen.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cutlayer.errors import DataError, StorageError

__all__ = ["Departure", "TranscriptWriter", "read_transcript"]

_HEAD, _INDEX = "head.json", "index.jsonl"
FORMAT = 2


@dataclass(frozen=True)
class Departure:
    """One forward of the client, and what the server got of it."""

    number: int
    step: int
    """Optimizer steps done before it."""
    smashed_BTD: Tensor
    carried: dict[str, Tensor]
    """`attention_mask` and `position_ids`, if they were sent."""
    truth: dict[str, Tensor]
    """`input_ids` and `labels`, as far as the model was called with them; (B, T)."""
    trunk_out_BTD: Tensor | None = None
    """What the server computed from it, where the client needed it."""
    gradient_BTD: Tensor | None = None
    """The gradient at the upper cut, if one left."""
    referenced: tuple[int, ...] = ()
    """Rows whose activations the server had from before: this forward only named them."""


class TranscriptWriter:
    """Record the departures of a run's steps 0, 1, 2, 4, 8, … up to a number of sequences."""

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], *, sequences: int, anew: bool = False
    ) -> None:
        """Begin a transcript; one that stands there is continued if it is of the same run.

        Args:
            folder: Where it goes.
            facts: What an audit must know: model, revision, cut, codec, defense, versions.
            sequences: How many sequences to record at most.
            anew: The run begins at its first step: what an earlier one recorded here goes.

        Raises:
            StorageError: If the folder cannot be written.
            DataError: If a transcript of another run stands there, or a damaged one.
        """
        self._folder = folder
        self._left = sequences
        self._lines = 0
        self._facts = {"format": FORMAT, **facts}
        self._chain = _beginning(self._facts)
        # A resumed run counts its forwards from 1 again; here each has a number of its own.
        self._before = 0
        self._recorded: set[int] = set()
        if (folder / _HEAD).exists():
            self._go_on(anew=anew)
        else:
            self._write(_INDEX, b"")
            self._write_head()

    def _go_on(self, *, anew: bool) -> None:
        self._drop_the_line_that_a_crash_left()
        head, lines = _read_index(self._folder)
        if head["facts"] != json.loads(json.dumps(self._facts)):
            raise DataError(
                f"'{self._folder}' holds the transcript of another run: name another output_dir, "
                "or move it away"
            )
        if anew:
            self._write(_INDEX, b"")
            self._write_head()
            self._forget([line["file"] for line in lines])
            return
        self._lines, self._chain = head["lines"], head["chain"]
        self._before = max((line["number"] for line in lines), default=0)
        self._left -= sum(line["shape"][0] for line in lines if line["kind"] == "activations")

    def _forget(self, files: Sequence[str]) -> None:
        try:
            for file in files:
                (self._folder / Path(file).name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"the earlier transcript in '{self._folder}' could not be taken away "
                f"({error.strerror}): move it away"
            ) from error

    def _drop_the_line_that_a_crash_left(self) -> None:
        """Take back what was appended to the index after the head was last written."""
        try:
            count = int(json.loads((self._folder / _HEAD).read_text())["lines"])
            texts = (self._folder / _INDEX).read_bytes().splitlines(keepends=True)
        except (OSError, ValueError, KeyError, TypeError):
            return  # reading it will say what is wrong
        if len(texts) == count + 1:
            self._write(_INDEX, b"".join(texts[:count]))

    def wants(self, step: int) -> bool:
        """Say whether departures of this step are recorded."""
        return self._left > 0 and step & (step - 1) == 0

    def activations(
        self,
        number: int,
        step: int,
        smashed_BTD: Tensor,
        carried: Mapping[str, Tensor],
        truth: Mapping[str, Tensor],
        *,
        referenced: Sequence[int] = (),
    ) -> None:
        """Record what the server has of a forward, if its step is one that is recorded.

        Args:
            number: The forward's.
            step: Optimizer steps done.
            smashed_BTD: The activations as the server has them.
            carried: Mask and position ids, the same.
            truth: What was not sent.
            referenced: Rows of them that left before this forward, which only named them.

        Raises:
            StorageError: If the disk is full.
        """
        if not self.wants(step):
            return
        self._left -= len(smashed_BTD)
        self._recorded.add(number)
        sent = {"smashed": smashed_BTD, **carried}
        self._add("activations", number, step, sent, referenced=list(referenced))
        self._add("truth", number, step, truth)

    def trunk_out(self, number: int, step: int, trunk_out_BTD: Tensor) -> None:
        """Record what the server answered to a recorded forward: it knows that too.

        Raises:
            StorageError: If the disk is full.
        """
        if number in self._recorded:
            self._add("trunk_out", number, step, {"trunk_out": trunk_out_BTD})

    def gradient(self, number: int, step: int, grad_BTD: Tensor) -> None:
        """Record the gradient that left for a recorded forward.

        Raises:
            StorageError: If the disk is full.
        """
        if number in self._recorded:
            self._add("gradient", number, step, {"gradient": grad_BTD})

    def _add(
        self,
        kind: str,
        number: int,
        step: int,
        tensors: Mapping[str, Tensor],
        *,
        referenced: Sequence[int] = (),
    ) -> None:
        body = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        file = f"{self._lines + 1:06d}-{kind}.safetensors"
        first = next(iter(tensors.values()), None)
        line = {
            "kind": kind,
            "number": self._before + number,
            "step": step,
            "file": file,
            "shape": list(first.shape) if first is not None else [0],
            "sha256": hashlib.sha256(body).hexdigest(),
            "previous": self._chain,
            **({"referenced": list(referenced)} if referenced else {}),
        }
        text = json.dumps(line, sort_keys=True)
        self._write(file, body)
        self._write(_INDEX, text.encode() + b"\n", append=True)
        self._lines += 1
        self._chain = hashlib.sha256(text.encode()).hexdigest()
        self._write_head()

    def _write_head(self) -> None:
        head = {"facts": self._facts, "lines": self._lines, "chain": self._chain}
        self._write(_HEAD, json.dumps(head, indent=2).encode())

    def _write(self, name: str, body: bytes, *, append: bool = False) -> None:
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if append:
                with path.open("ab") as file:
                    file.write(body)
                return
            aside = path.with_name(f".{name}.part")
            aside.unlink(missing_ok=True)
            # Never readable by others, not even for a moment.
            handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(body)
            aside.replace(path)
        except OSError as error:
            raise StorageError(
                f"the transcript could not be written to '{self._folder}' ({error.strerror}): free "
                "space, or set split_transcript to 0"
            ) from error


def read_transcript(folder: Path) -> tuple[dict[str, Any], Iterator[Departure]]:
    """Return a transcript's facts and its departures, each file checked when it is read.

    Raises:
        DataError: If there is none, or a line or a file is missing, changed or added.
    """
    head, lines = _read_index(folder)
    return head["facts"], _departures(folder, lines)


def _read_index(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        head = json.loads((folder / _HEAD).read_text())
        texts = (folder / _INDEX).read_text().splitlines()
        lines = [json.loads(text) for text in texts]
        facts, count, chain = dict(head["facts"]), int(head["lines"]), str(head["chain"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{folder}' holds no transcript that can be read ({type(error).__name__}): train with "
            "split_transcript above 0, and name the run's output_dir"
        ) from error
    if facts.get("format") != FORMAT:
        raise DataError(
            f"'{folder}' is a transcript of format {facts.get('format')} and this version reads "
            f"{FORMAT}: audit it with the version that wrote it"
        )
    previous = _beginning(facts)
    for number, (text, line) in enumerate(zip(texts, lines, strict=True)):
        if not isinstance(line, dict) or line.get("previous") != previous:
            before = "the one before" if number else "the run's facts"
            raise _damaged(folder, f"line {number + 1} of its index does not follow {before}")
        previous = hashlib.sha256(text.encode()).hexdigest()
    if len(lines) != count or previous != chain:
        raise _damaged(folder, f"its index has {len(lines)} lines and its head tells {count}")
    return {"facts": facts, "lines": count, "chain": chain}, lines


def _departures(folder: Path, lines: list[dict[str, Any]]) -> Iterator[Departure]:
    of = {(line["kind"], line["number"]): line for line in lines}

    def one(kind: str, number: int) -> Tensor | None:
        line = of.get((kind, number))
        return _tensors(folder, line)[kind] if line else None

    for line in lines:
        if line["kind"] != "activations":
            continue
        truth = of.get(("truth", line["number"]))
        if truth is None:
            continue  # the client was killed before it wrote them down
        sent = _tensors(folder, line)
        yield Departure(
            number=line["number"],
            step=line["step"],
            smashed_BTD=sent.pop("smashed"),
            carried=sent,
            truth=_tensors(folder, truth),
            trunk_out_BTD=one("trunk_out", line["number"]),
            gradient_BTD=one("gradient", line["number"]),
            referenced=tuple(line.get("referenced", ())),
        )


def _tensors(folder: Path, line: Mapping[str, Any]) -> dict[str, Tensor]:
    file = str(line["file"])
    try:
        if "/" in file or file.startswith("."):
            raise _damaged(folder, f"it names the file '{file}'")
        body = (folder / file).read_bytes()
        if hashlib.sha256(body).hexdigest() != line["sha256"]:
            raise _damaged(folder, f"{file} is not as it was written")
        tensors: dict[str, Tensor] = load(body)
    except OSError as error:
        raise _damaged(folder, f"{file} cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise _damaged(folder, f"{file} is no tensor file") from error
    return tensors


def _beginning(facts: Mapping[str, Any]) -> str:
    """Return what the first line follows: the run's facts, which the chain thus covers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, how: str) -> DataError:
    return DataError(
        f"the transcript in '{folder}' was cut off or altered ({how}): an audit of it would prove "
        "nothing; take the whole folder of the run"
    )
