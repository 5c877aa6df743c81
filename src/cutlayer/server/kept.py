"""What a forward leaves at the server for its backward."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from cutlayer.server.trunk import TenantTrunk

__all__ = ["Graph", "Kept"]


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
