"""A LoRA layer that runs the rows of several tenants, each with that one's own LoRA."""

# Shapes:  T tokens   U units: tenants, or rows where tenants have different numbers of them
#          M positions of a unit   I, O features   r rank

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from cutlayer.split.adapters import ADAPTER

__all__ = ["CannotFuse", "with_loras_of"]


class CannotFuse(Exception):
    """Trunks of this kind cannot run several tenants' rows at once; says why."""


@contextlib.contextmanager
def with_loras_of(
    units: Sequence[Sequence[LoraLayer]], leader: Sequence[LoraLayer], shape: tuple[int, int]
) -> Iterator[None]:
    """While open, the leader's layers run each unit of a batch with that unit's own LoRA.

    Args:
        units: The layers of each unit.
        leader: Those whose `forward` is replaced.
        shape: Rows and tokens of the batch.

    Raises:
        CannotFuse: If a layer is no plain LoRA, or is given anything but rows of tokens.
    """
    layers = list(zip(*units, strict=True))
    # All of them before any is changed: what stayed so would run others' LoRA in solo requests.
    for mine in leader:
        if type(mine) is not Linear or mine.lora_variant or mine.lora_B[ADAPTER].bias is not None:
            raise CannotFuse(f"a {type(mine).__name__} of peft's is no plain LoRA")
    try:
        for mine, of_units in zip(leader, layers, strict=True):
            mine.__dict__["forward"] = partial(_fused_linear, mine, of_units, shape)
        yield
    finally:
        for mine in leader:
            mine.__dict__.pop("forward", None)


def _fused_linear(
    mine: Linear, of_units: Sequence[Linear], shape: tuple[int, int], x: Tensor, *args: Any
) -> Tensor:
    """Return what each unit's LoRA layer gives for its rows of `x`, (rows, T, O)."""
    if tuple(x.shape[:-1]) != shape:
        raise CannotFuse(f"a layer was given {tuple(x.shape)} instead of rows of tokens")
    of_type = mine.lora_A[ADAPTER].weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        of_type = torch.get_autocast_dtype(x.device.type)
    with_loras: Tensor = _WithLoras.apply(
        mine.base_layer(x, *args),
        x,
        mine.scaling[ADAPTER],
        of_type,
        *(layer.lora_A[ADAPTER].weight for layer in of_units),
        *(layer.lora_B[ADAPTER].weight for layer in of_units),
    )
    return with_loras


class _WithLoras(torch.autograd.Function):
    """Add to a linear map's output what each unit's LoRA gives for its rows.

    With a rank of some few, how a product's factors lie in memory is worth a factor of five.
    Hence the low-rank side is kept as (U, r, M), and a weight's gradient is computed the way that
    is fast and turned around.

    The backward has `x` as it came, which layers that have it in common keep once, and stacks the
    weights anew: what is kept from forward to backward is memory that each batch touches anew,
    which takes longer than to stack. So who steps before its backward must not come through this.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        scaling: float,
        of_type: torch.dtype,
        *weights: Tensor,
    ) -> Tensor:
        """Return it.

        Args:
            ctx: What autograd keeps for the backward.
            result: The map's output, (rows, T, O).
            x: Its input, (rows, T, I).
            scaling: The LoRA's, of all units the same.
            of_type: The dtype in which a LoRA is computed.
            weights: The A of all units, (r, I), and then the B of all, (O, r).
        """
        units = len(weights) // 2
        with torch.autocast(x.device.type, enabled=False):
            a_UrI, b_UOr = _stacked(weights, of_type)
            x_UMI = x.to(of_type).reshape(units, -1, x.shape[-1])
            low_UrM = torch.bmm(a_UrI, x_UMI.transpose(1, 2)).mul_(scaling)
            sum_type = torch.promote_types(of_type, result.dtype)
            out_UMO = result.to(sum_type, copy=True).view(units, -1, result.shape[-1])
            out_UMO.baddbmm_(
                low_UrM.transpose(1, 2).to(sum_type), b_UOr.transpose(1, 2).to(sum_type)
            )
        ctx.save_for_backward(x, low_UrM)
        ctx.scaling, ctx.weights = scaling, weights
        return out_UMO.to(result.dtype).view(result.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the output, the input and the weights of all units."""
        x, low_UrM = ctx.saved_tensors
        a_UrI, b_UOr = _stacked(ctx.weights, low_UrM.dtype)
        grad_UMO = grad.to(a_UrI.dtype).reshape(len(a_UrI), -1, grad.shape[-1])
        grad_low_UrM = torch.bmm(b_UOr.transpose(1, 2), grad_UMO.transpose(1, 2)).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = torch.bmm(grad_low_UrM.transpose(1, 2), a_UrI).to(x.dtype).view(x.shape)
        x_UMI = x.to(a_UrI.dtype).reshape(len(a_UrI), -1, x.shape[-1])
        grad_a_UrI = torch.bmm(grad_low_UrM, x_UMI)
        grad_b_UOr = torch.bmm(low_UrM, grad_UMO).transpose(1, 2).contiguous()
        weight_type = ctx.weights[0].dtype
        of_weights = [each.to(weight_type).unbind() for each in (grad_a_UrI, grad_b_UOr)]
        return grad, grad_x, None, None, *of_weights[0], *of_weights[1]


def _stacked(weights: Sequence[Tensor], of_type: torch.dtype) -> tuple[Tensor, Tensor]:
    units = len(weights) // 2
    with torch.no_grad():
        a_UrI, b_UOr = torch.stack(list(weights[:units])), torch.stack(list(weights[units:]))
    return a_UrI.to(of_type), b_UOr.to(of_type)
