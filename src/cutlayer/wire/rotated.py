"""Codecs of a few bits a value: rotate a token until its values look Gaussian, then round them.

    rotated   subtract a static mean, rotate blocks by a Hadamard matrix, round each value to the
              Lloyd-Max levels of a Gaussian of the token's own size
    klt       subtract the mean, take the coordinates of a learnt basis (Karhunen-Loeve), spend
              bits where they vary; the rest is not sent
    waterfill rotate, and spend the bits on the longest tokens of the tensor: for gradients

A few tokens (the first of a row, mostly) are attention sinks: a nearly constant vector, tens of
times as long as the others. Each token is coded as the difference from the mean or from that
vector, whichever is nearer; the sign of its scale says which.

A tensor of N tokens is stored as N scales (bfloat16), then the packed codes of each token; of
`waterfill` first those of all tokens with one bit, then two, and so on.
"""

# Shapes:  N tokens   D model width   P width, padded to whole blocks   K coordinates kept

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from math import sqrt

import torch
from torch import Tensor

from cutlayer.wire.packing import packed, unpacked
from cutlayer.wire.scaled import PerToken, safe_inverse, stored_scale
from cutlayer.wire.statics import Statics

__all__ = ["LEVELS", "KarhunenLoeve", "Rotated", "Waterfilled", "block_of"]

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

_LEFT = (1.0, 0.36338, 0.11748, 0.03454, 0.0095, 0.0025, 0.00065)
"""What is left of a Gaussian's energy by bits: both sides of the wire derive bits from it."""

_LARGEST_BLOCK, _SMALLEST_BLOCK = 64, 32
# Values are looked up by their place on a grid that is finer than any two levels.
_GRID, _GRID_REACH = 4096, 8.0


def block_of(width: int) -> int:
    """Return the size of the blocks that are rotated: a power of two that divides the width.

    A width without a factor of 32 is padded with zeros to the next whole block of 32.
    """
    divisor = width & -width
    return min(max(divisor, _SMALLEST_BLOCK), _LARGEST_BLOCK)


@functools.cache
def _rotation(block: int) -> Tensor:
    """Return an orthogonal matrix: Hadamard's, with fixed signs, so that no constant stays one."""
    rows = torch.ones(1, 1)
    while len(rows) < block:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    drawn = hashlib.shake_128(b"cutlayer rotation 1").digest(block)
    signs = torch.tensor([1.0 if byte & 1 else -1.0 for byte in drawn])
    return signs[:, None] * rows / sqrt(block)


@functools.cache
def _levels(bits: int) -> Tensor:
    above = torch.tensor(LEVELS[bits])
    return torch.cat([-above.flip(0), above])


@functools.cache
def _nearest(bits: int) -> Tensor:
    """Return the code of the nearest level for each place of the grid."""
    levels = _levels(bits)
    middles = (torch.arange(_GRID) + 0.5) * (2 * _GRID_REACH / _GRID) - _GRID_REACH
    return torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _coded(unit_NP: Tensor, bits: int) -> Tensor:
    """Return the code of each value, which has about size 1; unit_NP is used up."""
    # NaN has no place, and its token's scale says NaN already.
    places = unit_NP.mul_(_GRID / (2 * _GRID_REACH)).add_(_GRID / 2).nan_to_num_(0.0)
    places = places.clamp_(0, _GRID - 1)
    found = _nearest(bits).to(unit_NP.device).index_select(0, places.to(torch.int32).flatten())
    return found.view(unit_NP.shape)


@functools.cache
def _told(bits: int) -> Tensor:
    """Return what each code stands for: its level, longer by what rounding shortens on average.

    Lloyd and Max's level is the mean of the values that round to it, which leaves the least error,
    and makes all of a token's values too small, by 12% at two bits. A model that is trained through
    it learns to overshoot by as much, and does so when the codec is gone (benchmarks/codecs).
    """
    return _levels(bits) / (1 - _LEFT[bits])


def _decoded(codes_NP: Tensor, bits: int) -> Tensor:
    levels = _told(bits).to(codes_NP.device)
    return levels.index_select(0, codes_NP.flatten().to(torch.int32)).view(codes_NP.shape)


def _size_of(x_ND: Tensor) -> Tensor:
    """Return the length of each token, also where its squares are beyond float32."""
    length_N = torch.linalg.vector_norm(x_ND, dim=-1)
    odd_N = ~((length_N > 1e-15) & (length_N < 1e15))
    if bool(odd_N.any()):
        length_N[odd_N] = torch.linalg.vector_norm(x_ND[odd_N].double(), dim=-1).float()
    return length_N


class _Centred(PerToken):
    """What both codecs share: what a token is the difference from, told by its scale's sign."""

    before = "rotated6"

    def __init__(self, carries: frozenset[str]) -> None:
        self.carries = carries

    @abstractmethod
    def _centred_codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        """Return scales and packed codes of tokens from which the mean was taken."""

    @abstractmethod
    def _centred_values(
        self, codes: Tensor, scale_N: Tensor, values: int, statics: Statics | None
    ) -> Tensor:
        """Return what `_centred_codes` was given, as far as it was kept."""

    def _codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        if statics is None:
            return self._centred_codes(x_ND, statics)
        mean_D, offset_D = statics.on(x_ND.device)
        x_ND = x_ND - mean_D
        # |x - offset|² < |x|², without a second pass over all values
        is_sink_N = x_ND @ offset_D > 0.5 * offset_D.square().sum()
        if bool(is_sink_N.any()):
            x_ND[is_sink_N] -= offset_D
        scale_N, codes = self._centred_codes(x_ND, statics)
        return torch.where(is_sink_N, -scale_N, scale_N), codes

    def _values(
        self, codes: Tensor, scale_N: Tensor, values: int, statics: Statics | None
    ) -> Tensor:
        x_ND = self._centred_values(codes, scale_N.abs().float(), values, statics)
        if statics is None:
            return x_ND
        mean_D, offset_D = statics.on(x_ND.device)
        x_ND = x_ND + mean_D
        is_sink_N = torch.signbit(scale_N)
        if bool(is_sink_N.any()):
            x_ND[is_sink_N] += offset_D
        return x_ND


class Rotated(_Centred):
    """Rotate blocks by a Hadamard matrix and round to so many bits a value."""

    learns = "mean"

    def __init__(self, bits: int, carries: frozenset[str]) -> None:
        super().__init__(carries)
        self.bits = bits

    def _row_bytes(self, values: int, statics: Statics | None) -> int:
        return _padded(values) * self.bits // 8

    def _centred_codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        scale_N, unit_NP = _scaled(x_ND)
        return scale_N, packed(_coded(unit_NP, self.bits), self.bits)

    def _centred_values(
        self, codes: Tensor, scale_N: Tensor, values: int, statics: Statics | None
    ) -> Tensor:
        unit_NP = _decoded(unpacked(codes, self.bits), self.bits)
        x_NP = _rotated(unit_NP, inverse=True).mul_(scale_N[:, None])
        return x_NP[:, :values]


def _scaled(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales of tokens, and their rotated values, which have about size 1."""
    padded = _padded(x_ND.shape[1])
    scale_N = stored_scale(_size_of(x_ND) / sqrt(padded))
    if padded > x_ND.shape[1]:
        x_ND = torch.nn.functional.pad(x_ND, (0, padded - x_ND.shape[1]))
    return scale_N, _rotated(x_ND, inverse=False).mul_(safe_inverse(scale_N)[:, None])


def _padded(values: int) -> int:
    block = block_of(values)
    return -(-values // block) * block


def _rotated(x_NP: Tensor, *, inverse: bool) -> Tensor:
    block = block_of(x_NP.shape[1])
    matrix = _rotation(block).to(x_NP.device)
    blocks = x_NP.reshape(-1, block)
    return (blocks @ (matrix.T if inverse else matrix)).view(x_NP.shape)


class KarhunenLoeve(_Centred):
    """Spend so many bits a value, on average, where a learnt basis says that values vary."""

    learns = "basis"

    def __init__(self, budget: float, carries: frozenset[str]) -> None:
        super().__init__(carries)
        self.budget = budget

    def _row_bytes(self, values: int, statics: Statics | None) -> int:
        assert statics is not None
        return statics.row_bytes

    def _centred_codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        assert statics is not None
        basis_DK, deviation_K = statics.coordinates(x_ND.device)
        y_NK = x_ND @ basis_DK
        scale_N = stored_scale(_size_of(y_NK) / torch.linalg.vector_norm(deviation_K))
        unit_NK = y_NK.mul_(safe_inverse(scale_N)[:, None]).div_(deviation_K)
        parts = [
            packed(_coded(unit_NK[:, start:end].contiguous(), bits), bits)
            for bits, start, end in statics.groups
        ]
        return scale_N, torch.cat(parts, dim=-1)

    def _centred_values(
        self, codes: Tensor, scale_N: Tensor, values: int, statics: Statics | None
    ) -> Tensor:
        assert statics is not None
        basis_DK, deviation_K = statics.coordinates(codes.device)
        parts, first = [], 0
        for bits, start, end in statics.groups:
            last = first + (end - start) * bits // 8
            parts.append(_decoded(unpacked(codes[:, first:last], bits), bits))
            first = last
        unit_NK = torch.cat(parts, dim=-1)
        return (unit_NK.mul_(deviation_K).mul_(scale_N[:, None])) @ basis_DK.T


class Waterfilled(PerToken):
    """As `Rotated`, but so many bits a value on average over a tensor: the longest tokens get most.

    Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3): a bit goes
    where it takes the most energy away, which both sides derive from the scales. A model that is
    sure of half its tokens has nearly no gradient there. Tokens are not coded by themselves, so it
    is for gradients alone, which flow from later positions to earlier ones anyway.
    """

    carries = frozenset({"gradients"})

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def _row_bytes(self, values: int, statics: Statics | None) -> int:
        return _padded(values) * self.bits // 8  # on average

    def _codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        scale_N, unit_NP = _scaled(x_ND)
        codes = x_ND.new_zeros(len(x_ND) * self._row_bytes(x_ND.shape[1], None), dtype=torch.uint8)
        first = 0
        for bits, tokens in self._by_bits(scale_N):
            part = packed(_coded(unit_NP[tokens], bits), bits).flatten()
            codes[first : first + len(part)] = part
            first += len(part)
        return scale_N, codes

    def _values(
        self, codes: Tensor, scale_N: Tensor, values: int, statics: Statics | None
    ) -> Tensor:
        padded, flat, first = _padded(values), codes.flatten(), 0
        unit_NP = torch.zeros(len(scale_N), padded, device=codes.device)
        for bits, tokens in self._by_bits(scale_N):
            last = first + len(tokens) * padded * bits // 8
            rows = flat[first:last].view(len(tokens), -1)
            unit_NP[tokens] = _decoded(unpacked(rows, bits), bits)
            first = last
        return _rotated(unit_NP, inverse=True).mul_(scale_N.float()[:, None])[:, :values]

    def _by_bits(self, scale_N: Tensor) -> list[tuple[int, Tensor]]:
        """Return the tokens that get so many bits, for each number of bits that some get."""
        # Float64 on the CPU, whatever the device: both sides must find the same.
        size_N = scale_N.cpu().double().nan_to_num_(0.0, 0.0, 0.0)
        left = torch.tensor(_LEFT, dtype=torch.float64)
        gain = (left[:-1] - left[1:])[:, None] * size_N.square()
        best = gain.flatten().argsort(descending=True, stable=True)
        chosen = best[: self.bits * len(size_N)] % max(1, len(size_N))
        bits_N = torch.bincount(chosen, minlength=len(size_N))
        found = [(bits, (bits_N == bits).nonzero()[:, 0]) for bits in range(1, len(_LEFT))]
        return [(bits, tokens.to(scale_N.device)) for bits, tokens in found if len(tokens)]
