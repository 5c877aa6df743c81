"""What a rotated value is rounded to, and the matrix that rotates: both sides hold the same.

Sums of a rotation are exact: what goes in are whole numbers, few enough that any order of adding
gives the same float32. So bytes and values are the same bits whatever device and library computed
them, and whatever tokens were computed beside.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

__all__ = [
    "GRID",
    "LEFT",
    "LEVELS",
    "PLACES",
    "STEPS",
    "STEPS_OF_PLACE",
    "block_of",
    "nearest",
    "padded_width",
    "rotation",
    "signs_of",
    "told",
]

LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.79788,),
    2: (0.45278, 1.51042),
    3: (0.24509, 0.75601, 1.34391, 2.15195),
    4: (0.1284, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259),
    5: (
        0.06589, 0.19805, 0.33138, 0.4667, 0.60493, 0.74714, 0.89457, 1.04878, 1.2118, 1.38634,
        1.57623, 1.78723, 2.02873, 2.31774, 2.69112, 3.26073,
    ),
    6: (
        0.03341, 0.10028, 0.1673, 0.23457, 0.30219, 0.37028, 0.43895, 0.50831, 0.5785, 0.64966,
        0.72192, 0.79547, 0.87048, 0.94715, 1.02574, 1.10649, 1.18972, 1.27579, 1.36514, 1.45828,
        1.55583, 1.65859, 1.76754, 1.88398, 2.00961, 2.14681, 2.29898, 2.4713, 2.67227, 2.91741,
        3.24044, 3.7441,
    ),
}  # fmt: skip
"""Levels above 0 of the Lloyd-Max quantiser of a Gaussian of size 1, by bits; the others mirror."""

LEFT = (1.0, 0.36338, 0.11748, 0.03454, 0.0095, 0.0025, 0.00065)
"""What is left of a Gaussian's energy by bits: both sides of the wire derive bits from it."""

_LARGEST_BLOCK, _SMALLEST_BLOCK = 64, 32
# Values are looked up by their place on a grid that is finer than any two levels.
GRID, _GRID_REACH = 4096, 8.0
# A rotated value in steps of its whole numbers: 2^9 to a place of the grid, 2^17 to size 1.
STEPS_OF_PLACE = 512
PLACES = GRID / (2 * _GRID_REACH)
STEPS = STEPS_OF_PLACE * PLACES
# A level in steps of what is told for it: 64 levels below 4 stay below 2^24.
_STEPS_OF_TOLD = 65536


def block_of(width: int) -> int:
    """Return the size of the blocks that are rotated: a power of two that divides the width.

    A width without a factor of 32 is padded with zeros to the next whole block of 32.
    """
    divisor = width & -width
    return min(max(divisor, _SMALLEST_BLOCK), _LARGEST_BLOCK)


@functools.cache
def signs_of(block: int) -> Tensor:
    """Return the fixed signs that come before Hadamard's matrix, so that no constant stays one."""
    drawn = hashlib.shake_128(b"cutlayer rotation 1").digest(block)
    return torch.tensor([1.0 if byte & 1 else -1.0 for byte in drawn])


@functools.cache
def rotation(block: int, device: torch.device) -> Tensor:
    """Return Hadamard's matrix with its signs: orthogonal but for its size, sqrt(block)."""
    rows = torch.ones(1, 1)
    while len(rows) < block:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return (signs_of(block)[:, None] * rows).to(device)


@functools.cache
def _levels(bits: int) -> Tensor:
    above = torch.tensor(LEVELS[bits])
    return torch.cat([-above.flip(0), above])


@functools.cache
def nearest(bits: int, device: torch.device) -> Tensor:
    """Return the code of the nearest level for each place of the grid."""
    levels = _levels(bits)
    middles = (torch.arange(GRID) + 0.5) * (2 * _GRID_REACH / GRID) - _GRID_REACH
    return torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2).to(device, torch.uint8)


@functools.cache
def told(bits: int, device: torch.device) -> Tensor:
    """Return what each code stands for: its level, longer by what rounding shortens on average.

    Lloyd and Max's level is the mean of the values that round to it, which leaves the least error,
    and makes all of a token's values too small, by 12% at two bits. A model that is trained through
    it learns to overshoot by as much, and does so when the codec is gone (benchmarks/codecs).
    """
    longer = _levels(bits) / (1 - LEFT[bits])
    return ((longer * _STEPS_OF_TOLD).round() / _STEPS_OF_TOLD).to(device)


def padded_width(values: int) -> int:
    """Return how many values a token of so many takes in whole blocks."""
    block = block_of(values)
    return -(-values // block) * block
