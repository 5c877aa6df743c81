"""What a forward leaves at the server for its backward."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from cutlayer.server.trunk import TenantTrunk

__all__ = ["Graph", "Kept", "checkpointed"]


class Kept(Protocol):
    """What a forward leaves for its backward; whoever drops it frees it."""

    out_BTD: Tensor

    def backward(self, trunk: TenantTrunk, grad_BTD: Tensor, hold: int) -> Tensor | None:
        """Accumulate the adapter's gradients; return that of the activations, if wanted."""


@dataclass
class Graph:
    """A graph of one tenant's own."""

    smashed_BTD: Tensor
    out_BTD: Tensor

    def backward(self, trunk: TenantTrunk, grad_BTD: Tensor, hold: int) -> Tensor | None:
        """Go through the graph, which frees it."""
        if self.out_BTD.requires_grad:
            with trunk.gradients.accumulating(hold):
                self.out_BTD.backward(grad_BTD.to(self.out_BTD.device))
        return self.smashed_BTD.grad


def checkpointed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a layer so that only its inputs are kept, and the rest is computed again."""
    forward = type(layer).forward.__get__(layer)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
