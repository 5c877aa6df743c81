"""Codecs of one byte a value: a scale for each token, and its values rounded on it.

A tensor of N tokens is stored as N scales (bfloat16), then the values. A token that has NaN or
infinity gets NaN for its scale, so that the check behind the codec sees it.
"""

# Shapes:  N tokens   D values of a token

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from cutlayer.wire.statics import Statics

__all__ = ["SCALE_BYTES", "Float8", "Int8", "in_dtype", "safe_inverse", "stored_scale", "tokens_of"]

SCALE_BYTES = 2
_SMALLEST = 1e-37


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


def in_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 values in a dtype, its largest number where rounding went beyond it."""
    if dtype == torch.float16:
        values = values.clamp(-65504, 65504)
    return values.to(dtype)


def parts_of(stored: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the scales and the bytes behind them."""
    stored = stored.clone() if stored.data_ptr() % SCALE_BYTES else stored
    return stored[: SCALE_BYTES * tokens].view(torch.bfloat16), stored[SCALE_BYTES * tokens :]


class Int8:
    """Round to the 255 steps between a token's largest value and its negative."""

    carries = frozenset({"activations", "gradients"})
    learns = before = ""
    largest = 127.0
    kept: torch.dtype = torch.int8

    def stored_bytes(
        self, shape: Sequence[int], dtype: torch.dtype, statics: Statics | None = None
    ) -> int:
        """Return a byte a value and two a token; integers are stored as they are."""
        if not dtype.is_floating_point:
            return prod(shape) * dtype.itemsize
        tokens, values = tokens_of(shape)
        return tokens * (values + SCALE_BYTES)

    def encode(self, tensor: Tensor, statics: Statics | None = None) -> Tensor:
        """Return the scales and the rounded values as bytes."""
        if not tensor.is_floating_point():
            return tensor
        x_ND = tensor.reshape(tokens_of(tensor.shape)).float()
        # Over no values there is no largest; torch refuses to look for one.
        peak_N = x_ND.abs().amax(-1) if x_ND.numel() else x_ND.new_zeros(len(x_ND))
        scale_N = stored_scale(peak_N / self.largest)
        steps_ND = (x_ND * safe_inverse(scale_N)[:, None]).clamp(-self.largest, self.largest)
        return torch.cat([scale_N.view(torch.uint8), self._rounded(steps_ND).flatten()])

    def decode(
        self,
        stored: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        statics: Statics | None = None,
    ) -> Tensor:
        """Return the values times their token's scale."""
        if not dtype.is_floating_point:
            stored = stored.clone() if stored.data_ptr() % dtype.itemsize else stored
            return stored.view(dtype).view(tuple(shape))
        tokens, values = tokens_of(shape)
        scale_N, codes = parts_of(stored, tokens)
        x_ND = codes.view(self.kept).view(tokens, values).float() * scale_N.float()[:, None]
        return in_dtype(x_ND, dtype).view(tuple(shape))

    def _rounded(self, steps_ND: Tensor) -> Tensor:
        return steps_ND.nan_to_num_().round_().to(torch.int8).view(torch.uint8)


class Float8(Int8):
    """Round to float8 (e4m3): three bits of mantissa, whatever the size of the value."""

    largest = 448.0
    kept = torch.float8_e4m3fn

    def _rounded(self, steps_ND: Tensor) -> Tensor:
        return steps_ND.nan_to_num_().to(torch.float8_e4m3fn).view(torch.uint8)
