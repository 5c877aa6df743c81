"""What a codec knows of the activations at a cut: learnt once from the first batches, then fixed.

A mean, the attention sinks' mean, and for `klt` a basis. The client learns them and sends them
once (`Calibrate`), so both sides hold the same bits.
"""

# Shapes:  N tokens   D model width   K coordinates kept

from __future__ import annotations

import functools
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.errors import NotFinite, ProtocolError

__all__ = ["Learner", "Statics", "statics_as_tensors", "statics_of"]

_SEPARATOR = "."
MOST_BITS = 6
_TOGETHER = 8
"""Coordinates that get the same bits, so that they fill whole bytes."""

# What a Lloyd-Max quantiser of so many bits leaves of a Gaussian's variance.
_LEFT = (1.0, 0.36338, 0.11748, 0.034548, 0.009501, 0.0025047, 0.00064424)


@dataclass(frozen=True, eq=False)
class Statics:
    """The static part of a codec for one direction.

    Attributes:
        mean_D: Of the tokens.
        sink_D: Of the attention sinks: the first token of each row.
        basis_DK: Orthonormal columns along which tokens vary, the strongest first.
        deviation_K: The standard deviation along each.
        bits_K: How many bits each gets, never more than the one before; uint8.
    """

    mean_D: Tensor
    sink_D: Tensor
    basis_DK: Tensor | None = None
    deviation_K: Tensor | None = None
    bits_K: Tensor | None = None

    @property
    def width(self) -> int:
        """How many values a token has."""
        return len(self.mean_D)

    @functools.cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """The coordinates that share a number of bits, as (bits, first, behind the last)."""
        assert self.bits_K is not None
        values, counts = torch.unique_consecutive(self.bits_K, return_counts=True)
        found, start = [], 0
        for bits, count in zip(values.tolist(), counts.tolist(), strict=True):
            found.append((bits, start, start + count))
            start += count
        return found

    @functools.cached_property
    def row_bytes(self) -> int:
        """How many bytes a token's coordinates take."""
        return sum(bits * (end - start) // 8 for bits, start, end in self.groups)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the mean, and how far the sinks are from it, as float32 on a device."""
        if device not in self._moves:
            mean_D = self.mean_D.to(device)
            self._moves[device] = mean_D, self.sink_D.to(device) - mean_D
        return self._moves[device]

    def coordinates(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the basis and the deviations as float32 on a device."""
        if device not in self._bases:
            assert self.basis_DK is not None
            assert self.deviation_K is not None
            self._bases[device] = self.basis_DK.to(device).float(), self.deviation_K.to(device)
        return self._bases[device]

    @functools.cached_property
    def _moves(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @functools.cached_property
    def _bases(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}


class Learner:
    """Learn the statics of one direction from tokens as they pass.

    Attributes:
        tokens: How many were seen, sinks left out.
    """

    def __init__(self, width: int, *, basis: bool) -> None:
        self.tokens = 0
        self._sum_D = torch.zeros(width)
        self._square_DD = torch.zeros(width, width) if basis else None
        self._about_D: Tensor | None = None
        self._sinks = 0
        self._sink_sum_D = torch.zeros(width)

    def see(
        self, x_BTD: Tensor, carried: Mapping[str, Tensor], wanted_N: Tensor | None = None
    ) -> None:
        """Take note of a batch.

        Args:
            x_BTD: Activations.
            carried: The attention mask and position ids that went with them, if any.
            wanted_N: The positions, row after row, that have a value; all by default.
        """
        x_BTD = x_BTD.detach().float().cpu()
        is_token_BT, is_sink_BT = _kinds(x_BTD.shape[:2], carried)
        if wanted_N is not None:
            has_value_BT = torch.zeros_like(is_token_BT)
            has_value_BT.view(-1)[wanted_N.cpu()] = True
            is_token_BT = is_token_BT & has_value_BT
        x_ND, sinks = x_BTD[is_token_BT & ~is_sink_BT], x_BTD[is_token_BT & is_sink_BT]
        self._sinks += len(sinks)
        self._sink_sum_D += sinks.sum(0)
        if not len(x_ND):
            return
        # About a first mean, else the differences of large sums would be lost in float32.
        self._about_D = x_ND.mean(0) if self._about_D is None else self._about_D
        x_ND = x_ND - self._about_D
        self.tokens += len(x_ND)
        self._sum_D += x_ND.sum(0)
        if self._square_DD is not None:
            self._square_DD.addmm_(x_ND.T, x_ND)

    def learnt(self, budget: float) -> Statics:
        """Return the statics; with a basis, for so many bits a value."""
        assert self._about_D is not None
        shift_D = self._sum_D / self.tokens
        mean_D = self._about_D + shift_D
        sink_D = self._sink_sum_D / self._sinks if self._sinks else mean_D
        if self._square_DD is None:
            return Statics(mean_D, sink_D)
        covariance = self._square_DD / self.tokens - torch.outer(shift_D, shift_D)
        variance_D, vectors = torch.linalg.eigh(covariance)
        deviation_D = variance_D.flip(0).clamp_min(1e-12).sqrt()
        bits_D = _spent(deviation_D.square().tolist(), budget)
        kept = int((bits_D > 0).sum())
        basis_DK = vectors.flip(1)[:, :kept].contiguous()
        return Statics(
            mean_D,
            sink_D,
            basis_DK.to(torch.bfloat16),
            deviation_D[:kept].clone(),
            bits_D[:kept].clone(),
        )


def _kinds(shape: Sequence[int], carried: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return which positions are tokens and which of them sinks, (B, T) each."""
    is_token_BT = torch.ones(tuple(shape), dtype=torch.bool)
    mask_BT = carried.get("attention_mask")
    if mask_BT is not None and mask_BT.shape == is_token_BT.shape:
        is_token_BT = mask_BT.bool().cpu()
    is_sink_BT = is_token_BT & (is_token_BT.cumsum(1) == 1)
    positions_BT = carried.get("position_ids")
    if positions_BT is not None and positions_BT.dim() == 2:
        # Several texts in one row: each begins with a sink.
        is_sink_BT = is_sink_BT | (positions_BT.cpu() == 0).expand(tuple(shape))
    return is_token_BT, is_sink_BT


def _spent(variances: Sequence[float], budget: float) -> Tensor:
    """Return the bits of each coordinate, spent one after another where they help most."""
    together = [sum(variances[i : i + _TOGETHER]) for i in range(0, len(variances), _TOGETHER)]
    bits = [0] * len(together)
    left = int(budget * len(variances)) // _TOGETHER
    heap = [(-variance * (_LEFT[0] - _LEFT[1]), i) for i, variance in enumerate(together)]
    heapq.heapify(heap)
    while left > 0 and heap:
        _gain, i = heapq.heappop(heap)
        bits[i] += 1
        left -= 1
        if bits[i] < MOST_BITS:
            more = _LEFT[bits[i]] - _LEFT[bits[i] + 1]
            heapq.heappush(heap, (-together[i] * more, i))
    whole = len(variances) // _TOGETHER * _TOGETHER
    found = torch.tensor(bits, dtype=torch.uint8).repeat_interleave(_TOGETHER)[:whole]
    return torch.cummin(found.int(), 0).values.to(torch.uint8)


_FIELDS = {
    "mean": "mean_D",
    "sink": "sink_D",
    "basis": "basis_DK",
    "deviation": "deviation_K",
    "bits": "bits_K",
}


def statics_as_tensors(statics: Mapping[str, Statics]) -> dict[str, Tensor]:
    """Return statics by direction as tensors by name, as they are sent and kept."""
    return {
        f"{direction}{_SEPARATOR}{short}": getattr(one, field)
        for direction, one in statics.items()
        for short, field in _FIELDS.items()
        if getattr(one, field) is not None
    }


def statics_of(tensors: Mapping[str, Tensor], width: int) -> dict[str, Statics]:
    """Return the statics that `statics_as_tensors` made tensors of.

    Args:
        tensors: What a client sent.
        width: How many values a token must have.

    Raises:
        ProtocolError: If they are not such tensors, or do not fit.
        NotFinite: If a number is NaN or infinite.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        direction, _, short = name.partition(_SEPARATOR)
        if short not in _FIELDS:
            raise ProtocolError(f"'{name}' is no part of a codec's statics")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"the statics '{name}' have NaN or infinity: nothing was taken up")
        found.setdefault(direction, {})[_FIELDS[short]] = tensor
    for direction, fields in found.items():
        if fault := _fault_of(fields, width):
            raise ProtocolError(f"the statics of '{direction}' do not fit: {fault}")
    return {direction: Statics(**fields) for direction, fields in found.items()}


def _fault_of(fields: Mapping[str, Tensor], width: int) -> str:
    means = [fields.get(name) for name in ("mean_D", "sink_D")]
    if any(m is None or m.dtype != torch.float32 or m.shape != (width,) for m in means):
        return f"mean and sink must be {width} float32 values"
    rest = [fields.get(name) for name in ("basis_DK", "deviation_K", "bits_K")]
    if all(tensor is None for tensor in rest):
        return ""
    basis_DK, deviation_K, bits_K = rest
    if basis_DK is None or deviation_K is None or bits_K is None or bits_K.dim() != 1:
        return "a basis needs its deviations and bits"
    kept = len(bits_K)
    if not 0 < kept <= width or kept % _TOGETHER:
        return f"{kept} coordinates are kept of {width}: a multiple of {_TOGETHER} is expected"
    if basis_DK.dtype != torch.bfloat16 or basis_DK.shape != (width, kept):
        return f"the basis must be {width} x {kept} bfloat16 values"
    if deviation_K.dtype != torch.float32 or deviation_K.shape != (kept,):
        return f"{kept} float32 deviations are expected"
    if not bool((deviation_K > 0).all()):
        return "deviations must be above 0"
    steps = bits_K.view(-1, _TOGETHER).int() if bits_K.dtype == torch.uint8 else None
    if steps is None or not bool(((steps >= 1) & (steps <= MOST_BITS)).all()):
        return f"bits must be whole numbers from 1 to {MOST_BITS}"
    if bool((steps != steps[:, :1]).any()) or bool((steps[1:, 0] > steps[:-1, 0]).any()):
        return f"bits must go down in groups of {_TOGETHER}"
    return ""
