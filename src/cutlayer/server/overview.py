"""What an operator may know of a server's sessions, in memory and parked."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cutlayer.server.metrics import RunFacts

if TYPE_CHECKING:
    from cutlayer.server.sessions import Sessions

__all__ = ["runs_of"]


def runs_of(sessions: Sessions) -> list[RunFacts]:
    """Return the sessions of a server: those in memory with their numbers, the parked by name."""
    now_s = time.monotonic()
    found = {
        session.identifier: RunFacts(
            session=session.identifier,
            tenant=session.tenant,
            run=session.run,
            state="streaming" if session.hang_up is not None else "silent",
            step=session.trunk.step,
            pending=session.trunk.pending,
            memory_bytes=session.memory.memory_bytes,
            silent_s=now_s - session.silent_since_s,
        )
        for session in sessions.in_memory()
    }
    for entry in sessions.known():
        if entry.identifier not in found:
            silent_s = time.time() - entry.marked_s
            parked = RunFacts(entry.identifier, entry.tenant, entry.run, "parked")
            found[entry.identifier] = replace(parked, silent_s=silent_s)
    return list(found.values())
