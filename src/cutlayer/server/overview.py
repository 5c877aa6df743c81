"""What an operator may know of the sessions in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cutlayer.server.memory import Memory
from cutlayer.server.metrics import RunFacts

if TYPE_CHECKING:
    from cutlayer.server.sessions import Sessions

__all__ = ["runs_of"]


def runs_of(sessions: Sessions) -> list[RunFacts]:
    """Return the open sessions of a server."""
    return [
        RunFacts(
            session=session.identifier,
            tenant=session.tenant,
            run=session.run,
            state="streaming",
            step=session.trunk.step,
            pending=session.trunk.pending,
            memory_bytes=Memory(session.trunk).memory_bytes,
        )
        for session in list(sessions._open.values())
    ]
