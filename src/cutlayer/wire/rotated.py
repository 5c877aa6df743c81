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

Rotations have two forms that give the same bits: products in torch, here, and `one_pass`, which is
several times as fast on a CPU and needs numba.
"""

# Shapes:  N tokens   D model width   P width, padded to whole blocks   K coordinates kept

from __future__ import annotations

from abc import abstractmethod
from math import sqrt

import torch
from torch import Tensor

from cutlayer.wire import one_pass
from cutlayer.wire.levels import (
    GRID,
    LEFT,
    PLACES,
    STEPS,
    STEPS_OF_PLACE,
    block_of,
    nearest,
    padded_width,
    rotation,
    told,
)
from cutlayer.wire.packing import packed, unpacked
from cutlayer.wire.scaled import PerToken, safe_inverse, stored_scale
from cutlayer.wire.statics import Statics

__all__ = ["KarhunenLoeve", "Rotated", "Waterfilled"]


def _coded(places_NP: Tensor, bits: int) -> Tensor:
    """Return the code of each value, of which its place on the grid is given."""
    # NaN becomes some place of the grid, and its token's scale says NaN already.
    whole = places_NP.to(torch.int32).clamp_(0, GRID - 1).flatten()
    return nearest(bits, places_NP.device).index_select(0, whole).view(places_NP.shape)


def _decoded(codes_NP: Tensor, bits: int) -> Tensor:
    levels = told(bits, codes_NP.device)
    return levels.index_select(0, codes_NP.flatten().to(torch.int32)).view(codes_NP.shape)


def _size_of(x_ND: Tensor) -> Tensor:
    """Return the length of each token; in float64, where no square is beyond it."""
    dtype = torch.float32 if x_ND.device.type == "mps" else torch.float64  # which that lacks
    return torch.linalg.vector_norm(x_ND, dim=-1, dtype=dtype)


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
        x_ND = _moved(x_ND, -offset_D, is_sink_N)
        scale_N, codes = self._centred_codes(x_ND, statics)
        return torch.where(is_sink_N, -scale_N, scale_N), codes

    def _fill(
        self, out_ND: Tensor, codes: Tensor, scale_N: Tensor, statics: Statics | None
    ) -> None:
        x_ND = self._centred_values(codes, scale_N.abs().float(), out_ND.shape[1], statics)
        if statics is None:
            out_ND.copy_(x_ND)
            return
        mean_D, offset_D = statics.on(x_ND.device)
        torch.add(x_ND, mean_D, out=out_ND)
        _moved(out_ND, offset_D, torch.signbit(scale_N))


def _moved(x_ND: Tensor, offset_D: Tensor, is_moved_N: Tensor) -> Tensor:
    """Return tokens with an offset added to some of them; x_ND is used up."""
    if x_ND.device.type != "cpu":
        # To ask whether there are any would wait for the device.
        return x_ND.addcmul_(is_moved_N[:, None].to(x_ND.dtype), offset_D)
    if bool(is_moved_N.any()):
        x_ND[is_moved_N] += offset_D
    return x_ND


class Rotated(_Centred):
    """Rotate blocks by a Hadamard matrix and round to so many bits a value."""

    learns = "mean"
    block_values = one_pass.BLOCK_VALUES if one_pass.IS_HERE else PerToken.block_values

    def __init__(self, bits: int, carries: frozenset[str]) -> None:
        super().__init__(carries)
        self.bits = bits

    def _row_bytes(self, values: int, statics: Statics | None) -> int:
        return padded_width(values) * self.bits // 8

    def _codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        if not one_pass.can(x_ND.device, x_ND.shape[1]):
            return super()._codes(x_ND, statics)
        scale_N, is_sink_N = one_pass.scales_of(x_ND, statics)
        codes_NP = one_pass.codes_of(x_ND, scale_N, is_sink_N, self.bits, statics)
        return torch.where(is_sink_N, -scale_N, scale_N), packed(codes_NP, self.bits)

    def _fill(
        self, out_ND: Tensor, codes: Tensor, scale_N: Tensor, statics: Statics | None
    ) -> None:
        if not one_pass.can(codes.device, out_ND.shape[1]):
            super()._fill(out_ND, codes, scale_N, statics)
            return
        one_pass.fill(out_ND, unpacked(codes, self.bits), scale_N, self.bits, statics)

    def _centred_codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        scale_N, places_NP = _scaled(x_ND)
        return scale_N, packed(_coded(places_NP, self.bits), self.bits)

    def _centred_values(
        self, codes: Tensor, scale_N: Tensor, values: int, statics: Statics | None
    ) -> Tensor:
        unit_NP = _decoded(unpacked(codes, self.bits), self.bits)
        return _rotated_back(unit_NP, scale_N, values)


def _scaled(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales of tokens, and the places on the grid of their rotated values."""
    values, padded = x_ND.shape[1], padded_width(x_ND.shape[1])
    block = block_of(values)
    scale_N = stored_scale(_size_of(x_ND) / sqrt(padded))
    # Whole numbers: 64 of a token's of 16,000 values add up to less than 2^24.
    whole_ND = (x_ND * (safe_inverse(scale_N) * (STEPS / sqrt(block)))[:, None]).round_()
    if padded > values:
        whole_ND = torch.nn.functional.pad(whole_ND, (0, padded - values))
    matrix = rotation(block, x_ND.device) / STEPS_OF_PLACE
    middle = torch.full((block,), GRID / 2, device=x_ND.device)
    places = torch.addmm(middle, whole_ND.reshape(-1, block), matrix)
    return scale_N, places.view(len(x_ND), padded)


def _rotated_back(unit_NP: Tensor, scale_N: Tensor, values: int) -> Tensor:
    """Return tokens from what their codes stand for."""
    block = block_of(values)
    x_NP = (unit_NP.reshape(-1, block) @ rotation(block, unit_NP.device).T).view(unit_NP.shape)
    return x_NP.mul_((scale_N.float() / sqrt(block))[:, None])[:, :values]


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
        places_NK = y_NK.mul_(safe_inverse(scale_N)[:, None]).div_(deviation_K / PLACES)
        places_NK.add_(GRID / 2)
        parts = [
            packed(_coded(places_NK[:, start:end], bits), bits)
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
    sees_others = True

    def __init__(self, bits: float) -> None:
        self.bits = bits

    def _row_bytes(self, values: int, statics: Statics | None) -> int:
        return int(padded_width(values) * self.bits) // 8  # on average

    def _codes(self, x_ND: Tensor, statics: Statics | None) -> tuple[Tensor, Tensor]:
        is_fast = one_pass.can(x_ND.device, x_ND.shape[1])
        scale_N, given_N = one_pass.scales_of(x_ND, None) if is_fast else _scaled(x_ND)
        codes = x_ND.new_zeros(len(x_ND) * self._row_bytes(x_ND.shape[1], None), dtype=torch.uint8)
        first = 0
        for bits, tokens in self._by_bits(scale_N):
            codes_NP = (
                one_pass.codes_of(x_ND, scale_N, given_N, bits, None, tokens)
                if is_fast
                else _coded(given_N[tokens], bits)
            )
            part = packed(codes_NP, bits).flatten()
            codes[first : first + len(part)] = part
            first += len(part)
        return scale_N, codes

    def _fill(
        self, out_ND: Tensor, codes: Tensor, scale_N: Tensor, statics: Statics | None
    ) -> None:
        flat, first, values = codes.flatten(), 0, out_ND.shape[1]
        # A token of no bits is 0, or NaN if its scale is.
        out_ND.copy_((scale_N.float() * 0)[:, None].expand_as(out_ND))
        for bits, tokens in self._by_bits(scale_N):
            last = first + len(tokens) * padded_width(values) * bits // 8
            codes_NP = unpacked(flat[first:last].view(len(tokens), -1), bits)
            first = last
            if one_pass.can(codes.device, values):
                one_pass.fill(out_ND, codes_NP, scale_N, bits, None, tokens)
            else:
                out_ND[tokens] = _rotated_back(_decoded(codes_NP, bits), scale_N[tokens], values)

    def _by_bits(self, scale_N: Tensor) -> list[tuple[int, Tensor]]:
        """Return the tokens that get so many bits, for each number of bits that some get."""
        # Float64 on the CPU, whatever the device: both sides must find the same.
        size_N = scale_N.cpu().double().nan_to_num_(0.0, 0.0, 0.0)
        left = torch.tensor(LEFT, dtype=torch.float64)
        gain = ((left[:-1] - left[1:])[:, None] * size_N.square()).flatten()
        wanted = int(self.bits * len(size_N))
        least = gain.topk(wanted, sorted=False).values.min() if wanted else 0.0
        is_chosen = gain > least
        # Of equals the first: fewer bits before more, then the earlier token.
        equals = (gain == least).nonzero()[:, 0]
        is_chosen[equals[: wanted - int(is_chosen.sum())]] = True
        bits_N = is_chosen.view(len(left) - 1, len(size_N)).sum(0)
        found = [(bits, (bits_N == bits).nonzero()[:, 0]) for bits in range(1, len(LEFT))]
        return [(bits, tokens.to(scale_N.device)) for bits, tokens in found if len(tokens)]
