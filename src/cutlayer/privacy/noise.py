"""Noise that cannot be drawn again: every number comes from the operating system's generator.

`torch.Generator` will not do. On the CPU it is a Mersenne Twister which keeps 32 bits of its seed,
so the noise of a whole batch is one of 2^32 tensors, and all of it follows from 624 outputs: a
server that knows one of the texts could compute the noise on the others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["secure_normal", "secure_uniform"]

_BITS = 52  # so that adding a half is exact in a float64


def secure_uniform(shape: Sequence[int]) -> Tensor:
    """Return numbers between 0 and 1, neither included, of `shape`, in float64 on the CPU."""
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(tuple(shape), dtype=torch.float64)
    drawn = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    whole = (drawn & ((1 << _BITS) - 1)).to(torch.float64)
    return ((whole + 0.5) * 2.0**-_BITS).reshape(tuple(shape))


def secure_normal(shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers of `shape`, in float64 on the CPU (Box and Muller, 1958).

    None is beyond 8.6, which an exact normal is with a probability below 1e-17.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    radius, angle = secure_uniform((2, half))
    radius = radius.log_().mul_(-2).sqrt_()
    angle = angle.mul_(2 * math.pi)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()])
    return pairs[:count].reshape(tuple(shape))
