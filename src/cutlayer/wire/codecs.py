"""How activations and gradients are written on the wire. A codec is never described as privacy.

To add a codec, add it to `CODECS`; the battery in tests/wire/test_codecs.py runs over that table.
A codec of activations acts on each token by itself: one that mixed positions would leak future
tokens into a causal model (tested). What it may know besides is static: `Statics`, learnt once.

Four tensors travel in a step, and each has a codec of its own: activations and gradients, up and
down (`DEPARTURES`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from cutlayer.wire import one_pass
from cutlayer.wire.rotated import KarhunenLoeve, Rotated, Waterfilled
from cutlayer.wire.scaled import SCALE_BYTES, Float8, Int8
from cutlayer.wire.statics import Statics

__all__ = [
    "CODECS",
    "DEPARTURES",
    "Codec",
    "codec_faults",
    "codec_words",
    "codecs_of",
    "in_force",
    "prepare",
    "round_trip",
    "token_bytes",
]

DEPARTURES = ("activations_up", "activations_down", "gradients_up", "gradients_down")
"""What may have a codec of its own, as `split_codec` names it."""


class Codec(Protocol):
    """What the wire asks of a codec. Gradients pass straight through it.

    Attributes:
        carries: What it may be chosen for: `activations`, `gradients`.
        learns: Of what its statics are made: nothing, a `mean`, or a `basis` too.
        before: The codec that stands in until those of activations are learnt.
        budget: Bits a value for which a basis is made; 0 for a codec without one.
    """

    carries: frozenset[str]
    learns: str
    before: str
    budget: float

    def stored_bytes(
        self, shape: Sequence[int], dtype: torch.dtype, statics: Statics | None = None
    ) -> int:
        """Return how many bytes a tensor takes on the wire."""

    def encode(self, tensor: Tensor, statics: Statics | None = None) -> Tensor:
        """Return a tensor whose bytes are what is sent."""

    def decode(
        self,
        stored: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        statics: Statics | None = None,
    ) -> Tensor:
        """Return the tensor that the other side works with.

        Args:
            stored: The bytes, uint8, as many as `stored_bytes` says.
            shape: Of the tensor.
            dtype: Of the tensor.
            statics: Those that it was encoded with.
        """


class Raw:
    """Send every bit: the only codec that keeps a split run bit-equal to the unsplit one."""

    carries = frozenset({"activations", "gradients"})
    learns = before = ""
    budget = 0.0

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the bytes on the wire for a tensor of `dtype`."""
        return dtype

    def stored_bytes(
        self, shape: Sequence[int], dtype: torch.dtype, statics: Statics | None = None
    ) -> int:
        """Return the size of so many values of the stored dtype."""
        return prod(shape) * self.stored_dtype(dtype).itemsize

    def encode(self, tensor: Tensor, statics: Statics | None = None) -> Tensor:
        """Return the tensor in its stored dtype; itself, if that is its own."""
        return tensor.to(self.stored_dtype(tensor.dtype))

    def decode(
        self,
        stored: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        statics: Statics | None = None,
    ) -> Tensor:
        """Return it in its own dtype again; a view of `stored` where nothing changed."""
        kept = self.stored_dtype(dtype)
        # A slice of a message may start off the dtype's alignment; copied then, which is rare.
        stored = stored.clone() if stored.data_ptr() % kept.itemsize else stored
        return stored.view(kept).view(tuple(shape)).to(dtype)


class BFloat16(Raw):
    """Round to bfloat16: half the bytes of float32, a relative error of at most 2^-8."""

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return bfloat16 for floats of more bits, else the dtype itself."""
        return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype


class Int32(Raw):
    """Write 64-bit integers (masks, positions) in 32 bits; leave all else as it is."""

    carries = frozenset()

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return int32 for int64, else the dtype itself."""
        return torch.int32 if dtype == torch.int64 else dtype


_ACTIVATIONS, _GRADIENTS = frozenset({"activations"}), frozenset({"gradients"})
_BOTH = _ACTIVATIONS | _GRADIENTS

CODECS: dict[str, Codec] = {
    "raw": Raw(),
    "bf16": BFloat16(),
    "int32": Int32(),
    "fp8": Float8(),
    "int8": Int8(),
    "rotated6": Rotated(6, _BOTH),
    "rotated5": Rotated(5, _BOTH),
    "rotated4": Rotated(4, _BOTH),
    "rotated3": Rotated(3, _BOTH),
    "rotated2": Rotated(2, _BOTH),
    # Forward at one bit fails (benchmarks/codecs); of a gradient it is enough.
    "rotated1": Rotated(1, _GRADIENTS),
    "waterfill3": Waterfilled(3),
    "waterfill2.5": Waterfilled(2.5),
    "waterfill2": Waterfilled(2),
    "waterfill1": Waterfilled(1),
    "klt2": KarhunenLoeve(2.0, _ACTIVATIONS),
    "klt1": KarhunenLoeve(1.0, _ACTIVATIONS),
}


def in_force(name: str, statics: Statics | None) -> str:
    """Return the codec that activations are written in: `name`, or what stands in before."""
    return name if statics is not None or not CODECS[name].learns else CODECS[name].before


def prepare(names: Iterable[str]) -> None:
    """Compile what these codecs need, if anything, so that no request waits for it."""
    codecs = [CODECS[name] for name in names]
    if any(isinstance(codec, Waterfilled) or codec.before for codec in codecs):
        one_pass.prepare()


def token_bytes(name: str, width: int, dtype: torch.dtype) -> float:
    """Return the bytes of one token of so many values, once statics are learnt."""
    codec = CODECS[name]
    if codec.learns == "basis":
        return SCALE_BYTES + codec.budget * width / 8
    return codec.stored_bytes((1, width), dtype)


def codecs_of(asked: str | Mapping[str, str]) -> dict[str, str]:
    """Return the codec of each departure: one name for all, or names by departure, else `raw`."""
    if isinstance(asked, str):
        return dict.fromkeys(DEPARTURES, asked)
    return dict.fromkeys(DEPARTURES, "raw") | dict(asked)


def codec_faults(codecs: Mapping[str, str]) -> list[str]:
    """Return one sentence for each codec that is unknown or not meant for its departure."""
    faults = [
        f"codec of '{departure}' is unknown: one of {', '.join(DEPARTURES)}"
        for departure in codecs
        if departure not in DEPARTURES
    ]
    for departure in DEPARTURES:
        name, kind = codecs.get(departure, "raw"), departure.partition("_")[0]
        if name not in CODECS or kind not in CODECS[name].carries:
            choices = ", ".join(known for known, codec in CODECS.items() if kind in codec.carries)
            fault = f"is not for {kind}" if name in CODECS else "is unknown"
            faults.append(f"codec '{name}' {fault}: one of {choices}")
    # One sentence for a name, however many departures it was given for.
    return list({fault.partition(": ")[0]: fault for fault in faults}.values())


def round_trip(name: str, tensor: Tensor, statics: Statics | None = None) -> Tensor:
    """Return a tensor as the other side gets it; before statics are learnt, if none are given."""
    codec = CODECS[name]
    if codec.learns == "basis" and statics is None:
        codec = CODECS[codec.before]
    stored = codec.encode(tensor, statics).contiguous().view(-1)
    as_bytes = (
        stored.view(torch.uint8) if stored.numel() else stored.new_empty(0, dtype=torch.uint8)
    )
    return codec.decode(as_bytes, tensor.shape, tensor.dtype, statics)


def codec_words(codecs: Mapping[str, str]) -> str:
    """Return the codecs as a reader wants them: one name if all are the same."""
    names = [codecs.get(departure, "raw") for departure in DEPARTURES]
    if len(set(names)) == 1:
        return names[0]
    return ", ".join(
        f"{departure} {name}" for departure, name in zip(DEPARTURES, names, strict=True)
    )
