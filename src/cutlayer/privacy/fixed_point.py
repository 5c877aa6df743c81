"""Adapters as vectors of integers that add up exactly, modulo 2^32 or 2^64."""

# Shapes:  P parameters

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import ConfigError, DataError, NotFinite

__all__ = ["FixedPoint", "flatten", "unflatten"]


@dataclass(frozen=True)
class FixedPoint:
    """How real numbers are written as integers that add up without overflow."""

    clip: float
    """The largest magnitude; what is beyond is cut off."""
    levels: int = 1 << 22
    """How many values there are from -clip to clip."""
    bits: int = 32
    """Sums are modulo 2 to this power: 32 or 64."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: Naming all that is wrong.
        """
        faults = []
        if not (math.isfinite(self.clip) and self.clip > 0):
            faults.append(f"clip={self.clip} must be greater than 0")
        if self.bits not in (32, 64):
            faults.append(f"bits={self.bits} must be 32 or 64")
        if not 2 <= self.levels <= 1 << 52:
            faults.append(f"levels={self.levels} must be from 2 to 2**52")
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def quantum(self) -> float:
        """The distance between two neighbouring values."""
        return 2 * self.clip / (self.levels - 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integers' dtype, little endian on every machine."""
        return np.dtype("<u4" if self.bits == 32 else "<u8")

    def clipped_share(self, vector_P: np.ndarray) -> float:
        """Return the share of values that the clip cuts off; they are sent as -clip or clip."""
        return float(np.mean(np.abs(vector_P) > self.clip)) if vector_P.size else 0.0

    def encode(self, vector_P: np.ndarray) -> np.ndarray:
        """Return the nearest integers, (P,); the error is half a quantum where nothing is cut off.

        Raises:
            NotFinite: If a value is NaN or infinite.
        """
        vector_P = np.asarray(vector_P, dtype=np.float64)
        if not np.isfinite(vector_P).all():
            raise NotFinite(
                "an input to secure aggregation is NaN or infinite and would spoil everybody's "
                "sum: nothing was sent; look at this client's training"
            )
        steps_P = np.rint((np.clip(vector_P, -self.clip, self.clip) + self.clip) / self.quantum)
        return steps_P.astype(self.dtype)

    def decode(self, sum_P: np.ndarray, clients: int) -> np.ndarray:
        """Return the real numbers, (P,), of a sum over so many clients."""
        return sum_P.astype(np.float64) * self.quantum - clients * self.clip


def flatten(tensors: Mapping[str, Tensor]) -> np.ndarray:
    """Return all numbers of an adapter, (P,), in the order of its names."""
    parts = [tensors[name].detach().cpu().double().flatten() for name in sorted(tensors)]
    return torch.cat(parts).numpy() if parts else np.zeros(0)


def unflatten(vector_P: np.ndarray, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the names, shapes and dtypes of `like`, made of these numbers.

    Raises:
        DataError: If there are more or fewer numbers.
    """
    sizes = [like[name].numel() for name in sorted(like)]
    if sum(sizes) != len(vector_P):
        raise DataError(f"{len(vector_P)} numbers for an adapter that has {sum(sizes)}")
    parts = torch.from_numpy(np.ascontiguousarray(vector_P)).split(sizes)
    return {
        name: part.reshape(like[name].shape).to(like[name].dtype)
        for name, part in zip(sorted(like), parts, strict=True)
    }
