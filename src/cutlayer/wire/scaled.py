"""Codecs with a scale for each token; those of one byte a value round its values on it.

A tensor of N tokens is stored as N scales (bfloat16), then the codes. A token that has NaN or
infinity gets NaN for its scale, so that the check behind the codec sees it.
"""

# Shapes:  N tokens   D values of a token

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from cutlayer.wire.statics import Statics

__all__ = ["SCALE_BYTES", "Float8", "Int8", "PerToken", "safe_inverse", "stored_scale"]

SCALE_BYTES = 2
# The inverse of a scale is multiplied by up to 2^17 and must stay a float32.
_SMALLEST = 1e-33


def tokens_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return how many tokens a shape has, and how many values each: its last dimension."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def stored_scale(scale_N: Tensor) -> Tensor:
    """Return scales as they are stored: bfloat16, NaN if not finite, 0 if all too small."""
    scale_N = torch.where(scale_N < _SMALLEST, 0.0, scale_N)
    rounded_N = scale_N.to(torch.bfloat16)
    return torch.where(rounded_N.isfinite(), rounded_N, float("nan"))


def safe_inverse(scale_N: Tensor) -> Tensor:
    """Return 1 / scale, and 0 for a scale of 0."""
    return torch.where(scale_N == 0, 0.0, 1 / scale_N.float())


class PerToken(ABC):
    """What every codec with a scale for each token shares: how both are laid out.

    A codec says how many bytes a token's values take, and how to write and read them.
    """

    carries = frozenset({"activations", "gradients"})
    learns = before = ""
    budget = 0.0
    sees_others = False
    # Worked on at a time on a CPU: few enough that what lies between stays in its cache.
    block_values = 1 << 18

    @abstractmethod
    def _row_bytes(self, values: int, statics: Statics | None) -> int:
        """Return the bytes of a token of so many values, its scale apart."""

    @abstractmethod
    def _codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        """Return the scales of tokens, (N,) in bfloat16, and their codes as bytes."""

    @abstractmethod
    def _fill(
        self, out_ND: Tensor, codes: Tensor, scale_N: Tensor, statics: Statics | None
    ) -> None:
        """Write tokens, in float32, from what `_codes` returned."""

    def stored_bytes(
        self, shape: Sequence[int], dtype: torch.dtype, statics: Statics | None = None
    ) -> int:
        """Return the bytes of all codes and scales; integers are stored as they are."""
        if not dtype.is_floating_point:
            return prod(shape) * dtype.itemsize
        tokens, values = tokens_of(shape)
        return tokens * (SCALE_BYTES + self._row_bytes(values, statics))

    def encode(self, tensor: Tensor, statics: Statics | None = None) -> Tensor:
        """Return the scales and the codes as bytes."""
        if not tensor.is_floating_point():
            return tensor
        tokens, values = tokens_of(tensor.shape)
        x_ND, row = tensor.reshape(tokens, values), self._row_bytes(values, statics)
        stored = torch.empty(tokens * (SCALE_BYTES + row), dtype=torch.uint8, device=tensor.device)
        scales_N, codes = _parts(stored, tokens, row)
        with _autocast_off(tensor.device):
            for rows in self._blocks(x_ND):
                scales_N[rows], found = self._codes(x_ND[rows].float(), statics)
                codes[rows] = found.view(codes[rows].shape)
        return stored

    def decode(
        self,
        stored: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        statics: Statics | None = None,
    ) -> Tensor:
        """Return the tensor, each token up to the rounding of its own values."""
        alignment = SCALE_BYTES if dtype.is_floating_point else dtype.itemsize
        stored = stored.clone() if stored.data_ptr() % alignment else stored
        if not dtype.is_floating_point:
            return stored.view(dtype).view(tuple(shape))
        tokens, values = tokens_of(shape)
        scales_N, codes = _parts(stored, tokens, self._row_bytes(values, statics))
        out_ND = torch.empty(tokens, values, dtype=dtype, device=stored.device)
        with _autocast_off(stored.device):
            for rows in self._blocks(out_ND):
                if dtype == torch.float32:
                    self._fill(out_ND[rows], codes[rows], scales_N[rows], statics)
                    continue
                x_ND = torch.empty(out_ND[rows].shape, device=stored.device)
                self._fill(x_ND, codes[rows], scales_N[rows], statics)
                # Its largest number where rounding went beyond it.
                out_ND[rows] = x_ND.clamp_(-65504, 65504) if dtype == torch.float16 else x_ND
        return out_ND.view(tuple(shape))

    def _blocks(self, x_ND: Tensor) -> Iterator[slice]:
        """Return which tokens to work on at a time: all of them, unless it is on a CPU."""
        tokens, values = x_ND.shape
        most = max(1, self.block_values // max(1, values))
        most = tokens if x_ND.device.type != "cpu" or self.sees_others else most
        return (slice(first, first + most) for first in range(0, tokens, max(1, most)))


def _autocast_off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _parts(stored: Tensor, tokens: int, row_bytes: int) -> tuple[Tensor, Tensor]:
    scales_N = stored[: SCALE_BYTES * tokens].view(torch.bfloat16)
    return scales_N, stored[SCALE_BYTES * tokens :].view(tokens, row_bytes)


class Int8(PerToken):
    """Round to the 255 steps between a token's largest value and its negative."""

    largest = 127.0
    kept: torch.dtype = torch.int8

    def _row_bytes(self, values: int, statics: Statics | None) -> int:
        return values

    def _codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        # Over no values there is no largest; torch refuses to look for one.
        peak_N = x_ND.abs().amax(-1) if x_ND.numel() else x_ND.new_zeros(len(x_ND))
        scale_N = stored_scale(peak_N / self.largest)
        steps_ND = (x_ND * safe_inverse(scale_N)[:, None]).clamp_(-self.largest, self.largest)
        return scale_N, self._rounded(steps_ND.nan_to_num_()).view(torch.uint8)

    def _fill(
        self, out_ND: Tensor, codes: Tensor, scale_N: Tensor, statics: Statics | None
    ) -> None:
        torch.mul(codes.view(self.kept).float(), scale_N.float()[:, None], out=out_ND)

    def _rounded(self, steps_ND: Tensor) -> Tensor:
        return steps_ND.round_().to(self.kept)


class Float8(Int8):
    """Round to float8 (e4m3): three bits of mantissa, whatever the size of the value."""

    largest = 448.0
    kept = torch.float8_e4m3fn

    def _rounded(self, steps_ND: Tensor) -> Tensor:
        return steps_ND.to(self.kept)
