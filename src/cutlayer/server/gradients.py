"""The accumulated gradients of a tenant's adapter, and those that wait for their commit.

A client that does the backward of each micro-chunk within its forward (client/pipeline.py) does
not know yet what its trainer will multiply the loss by, nor whether it will call `backward` at
all. Such gradients are held apart; they are linear in that factor, so it is applied at the commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cutlayer.errors import ProtocolError

__all__ = ["Gradients"]


class Gradients:
    """What was accumulated in `parameters`, and what is held under numbers of the client's own."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._held: dict[int, list[Tensor | None]] = {}

    @property
    def holds(self) -> int:
        """How many sets of gradients wait for their commit."""
        return len(self._held)

    @property
    def accumulated(self) -> bool:
        """Whether there are committed gradients that no step has used."""
        return any(p.grad is not None for p in self._parameters)

    @contextlib.contextmanager
    def accumulating(self, hold: int = 0) -> Iterator[None]:
        """While open, a backward accumulates under `hold`; 0 stands for the committed ones."""
        if not hold:
            yield
            return
        committed = [p.grad for p in self._parameters]
        self._put(self._held.get(hold, [None] * len(committed)))
        try:
            yield
        finally:
            self._held[hold] = [p.grad for p in self._parameters]
            self._put(committed)

    def add(self, grads: Sequence[Tensor], hold: int = 0) -> None:
        """Accumulate gradients that were computed elsewhere, one for each parameter."""
        with self.accumulating(hold):
            for parameter, grad in zip(self._parameters, grads, strict=True):
                # A copy: what comes is a slice of a tensor that has other tenants' in it too.
                known = parameter.grad
                parameter.grad = grad.clone() if known is None else known.add_(grad)

    def _put(self, grads: Sequence[Tensor | None]) -> None:
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad

    def commit(self, hold: int, factor: float) -> None:
        """Add the gradients under `hold`, times `factor`, to the committed ones.

        Raises:
            ProtocolError: If there are none.
        """
        held = self._held.pop(hold, None)
        if held is None:
            raise ProtocolError(f"there are no gradients under {hold}: they are committed once")
        for parameter, grad in zip(self._parameters, held, strict=True):
            if grad is None:
                continue
            if factor != 1.0:
                grad.mul_(factor)
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def release(self, hold: int) -> None:
        """Drop the gradients under `hold`."""
        self._held.pop(hold, None)

    def zero(self) -> None:
        """Drop the committed gradients."""
        self._put([None] * len(self._parameters))

    def scale(self, factor: float) -> None:
        """Multiply the committed gradients."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if grads:
            told = torch.tensor(factor, dtype=grads[0].dtype, device=grads[0].device)
            torch._foreach_mul_(grads, told)

    def norms(self, hold: int = 0) -> Tensor:
        """Return each parameter's 2-norm, (parameters,), as if `hold` were committed.

        They are told one by one, because the root of one sum of squares is not bit-equal. All are
        0 while a parameter has no gradient.
        """
        committed = [p.grad for p in self._parameters]
        pairs = zip(committed, self._held.get(hold, [None] * len(committed)), strict=True)
        both = [a if b is None else b if a is None else a + b for a, b in pairs]
        found = [grad for grad in both if grad is not None]
        if len(found) != len(committed):
            return torch.zeros(len(committed))
        return torch.stack(torch._foreach_norm(found)).cpu() if found else torch.zeros(0)
