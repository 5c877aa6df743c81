"""Tokens to rotated codes and back, by the functions of `fast`, where those can do it."""

# Shapes:  N tokens   R some of them   D values of a token

from __future__ import annotations

import functools
import importlib.util
import logging
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.wire.levels import GRID, STEPS, block_of, nearest, signs_of, told
from cutlayer.wire.scaled import safe_inverse, stored_scale
from cutlayer.wire.statics import Statics

__all__ = ["BLOCK_VALUES", "IS_HERE", "can", "codes_of", "fill", "prepare", "scales_of"]

log = logging.getLogger(__name__)

IS_HERE = importlib.util.find_spec("numba") is not None
"""Whether there is anything that can be coded here."""

BLOCK_VALUES = 1 << 20
"""How many values are best taken at a time."""

_CPU = torch.device("cpu")


def can(device: torch.device, values: int) -> bool:
    """Say whether tokens of so many values on this device can be coded here."""
    is_fit = device.type == "cpu" and values > 0 and values % 64 == 0
    return IS_HERE and is_fit and _fast() is not None


@functools.cache
def _fast() -> Any:
    # On first use: it takes 110 MiB, which a run without such codecs should not pay.
    try:
        from cutlayer.wire import fast
    except Exception as error:  # one that does not suit numpy, say
        log.warning("numba cannot be imported (%s): codecs are slower without", error)
        return None
    return fast


@functools.cache
def prepare() -> None:
    """Have the functions compiled now, in a few seconds, so that no request waits for it."""
    if can(_CPU, 64):
        x_ND = torch.zeros(1, 64)
        scale_N, is_sink_N = scales_of(x_ND, None)
        fill(x_ND, codes_of(x_ND, scale_N, is_sink_N, 1, None), scale_N, 1, None)


def scales_of(x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
    """Return the tokens' scales, and which of them are sinks."""
    mean_D, offset_D, half = _moves(statics, x_ND.shape[1])
    squares_N = torch.empty(len(x_ND), dtype=torch.float64)
    is_sink_N = torch.empty(len(x_ND), dtype=torch.bool)
    _fast().sums(_array(x_ND), mean_D, offset_D, half, squares_N.numpy(), is_sink_N.numpy())
    return stored_scale(squares_N.sqrt_() / sqrt(x_ND.shape[1])), is_sink_N


def codes_of(
    x_ND: Tensor,
    scale_N: Tensor,
    is_sink_N: Tensor,
    bits: int,
    statics: Statics | None,
    rows_R: Tensor | None = None,
) -> Tensor:
    """Return the codes of tokens whose scales are known, of all or of some, (R, D)."""
    values = x_ND.shape[1]
    rows_R = torch.arange(len(x_ND)) if rows_R is None else rows_R
    mean_D, offset_D, _half = _moves(statics, values)
    factor_N = safe_inverse(scale_N) * (STEPS / sqrt(block_of(values)))
    codes_RD = torch.empty(len(rows_R), values, dtype=torch.uint8)
    _fast().encode(
        rows_R.numpy(),
        _array(x_ND),
        mean_D,
        offset_D,
        is_sink_N.numpy(),
        factor_N.numpy(),
        _signs(values),
        _edges(bits),
        codes_RD.numpy(),
    )
    return codes_RD


def fill(
    out_ND: Tensor,
    codes_RD: Tensor,
    scale_N: Tensor,
    bits: int,
    statics: Statics | None,
    rows_R: Tensor | None = None,
) -> None:
    """Write the tokens that were coded, all or some; the sign of a scale tells of a sink."""
    values = out_ND.shape[1]
    rows_R = torch.arange(len(out_ND)) if rows_R is None else rows_R
    mean_D, offset_D, _half = _moves(statics, values)
    factor_N = scale_N.abs().float() / sqrt(block_of(values))
    _fast().decode(
        rows_R.numpy(),
        codes_RD.numpy(),
        told(bits, _CPU).numpy(),
        _signs(values),
        factor_N.numpy(),
        torch.signbit(scale_N).numpy(),
        mean_D,
        offset_D,
        out_ND.numpy(),
    )


def _array(x_ND: Tensor) -> np.ndarray:
    return x_ND.detach().contiguous().numpy()


def _moves(statics: Statics | None, values: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean, offset of the sinks, and half the square of its length."""
    if statics is None:
        return _zeros(values), _zeros(values), 0.0
    mean_D, offset_D = statics.on(_CPU)
    return mean_D.numpy(), offset_D.numpy(), float(0.5 * offset_D.square().sum())


@functools.cache
def _zeros(values: int) -> np.ndarray:
    return np.zeros(values, np.float32)


@functools.cache
def _signs(values: int) -> np.ndarray:
    return signs_of(64).repeat(values // 64).numpy()


@functools.cache
def _edges(bits: int) -> np.ndarray:
    """Return at which place above the grid's middle each level above the first begins."""
    above = nearest(bits, _CPU)[GRID // 2 :].to(torch.int16)
    return (above.diff().nonzero()[:, 0] + 1).to(torch.int16).numpy()
