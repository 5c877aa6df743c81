"""Replies that are on their way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cutlayer.wire.tensors import refuse_not_finite

__all__ = ["Named", "Pending", "Traffic"]


@dataclass
class Traffic:
    """What went over the link, and how long we waited for it."""

    sent_bytes: int = 0
    received_bytes: int = 0
    waited_s: float = 0.0
    trunk_s: float = 0.0
    """Seconds that the trunk computed for us."""
    trunk_forward_s: float = 0.0
    """Those of them that were forwards."""
    queued_s: float = 0.0
    """Seconds that our requests waited for the trunk's turn."""
    resent: int = 0
    """Requests that were sent again after the link or the server had broken."""


class Waiter(Protocol):
    """What a reply asks of its connection."""

    norms: Tensor | None

    def await_reply(self, pending: Pending) -> dict[str, Tensor]:
        """Wait for a reply."""


@dataclass
class Pending:
    """A reply that is on its way."""

    connection: Waiter
    sequence: int = 0
    unattended: bool = False
    device: torch.device | None = None
    """Where what was asked came from, and the answer goes."""
    future: Future[dict[str, Tensor]] = field(default_factory=Future)

    def wait(self) -> dict[str, Tensor]:
        """Return the reply's tensors."""
        return self.connection.await_reply(self)


@dataclass(frozen=True)
class Named:
    """One tensor of a reply that is on its way."""

    pending: Pending
    name: str
    placed: Callable[[Tensor], Tensor] | None = None
    """Makes of what came what is waited for."""

    def arrived(self) -> bool:
        """Say whether the reply is there."""
        return self.pending.future.done()

    def wait(self) -> Tensor | None:
        """Return the tensor, `None` if the reply has none.

        Raises:
            NotFinite: If it is NaN or infinite.
        """
        tensors = self.pending.wait()
        if "norms" in tensors:
            self.pending.connection.norms = tensors["norms"]
        tensor = tensors.get(self.name)
        if tensor is not None:
            refuse_not_finite(
                tensor, f"what the server sent ({self.name})", "lower the learning rate"
            )
            tensor = self.placed(tensor) if self.placed else tensor
        return tensor
