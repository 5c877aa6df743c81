"""How activations and gradients are written on the wire. A codec is never described as privacy.

To add a codec, add it to `CODECS`; the battery in tests/conformance runs over that table. A codec
acts on each token by itself: one that mixed positions would leak future tokens into a causal
model (tested).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CODECS", "Codec"]


class Codec(Protocol):
    """What the wire asks of a codec. Gradients pass straight through it."""

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the bytes on the wire for a tensor of `dtype`."""

    def encode(self, tensor: Tensor) -> Tensor:
        """Return what is sent, of the stored dtype and the same shape."""

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tensor of `dtype` that the other side works with."""


class Raw:
    """Send every bit: the only codec that keeps a split run bit-equal to the unsplit one."""

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype itself."""
        return dtype

    def encode(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tensor."""
        return stored


class BFloat16:
    """Round to bfloat16: half the bytes of float32, a relative error of at most 2^-8."""

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return bfloat16 for floats of more bits, else the dtype itself."""
        return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype

    def encode(self, tensor: Tensor) -> Tensor:
        """Return the rounded tensor."""
        return tensor.to(self.stored_dtype(tensor.dtype))

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return it in its own dtype again."""
        return stored.to(dtype)


class Int32:
    """Write 64-bit integers (masks, positions) in 32 bits; leave all else as it is."""

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return int32 for int64, else the dtype itself."""
        return torch.int32 if dtype == torch.int64 else dtype

    def encode(self, tensor: Tensor) -> Tensor:
        """Return the narrower tensor."""
        return tensor.to(self.stored_dtype(tensor.dtype))

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return it in its own dtype again."""
        return stored.to(dtype)


CODECS: dict[str, Codec] = {"raw": Raw(), "bf16": BFloat16(), "int32": Int32()}
