"""The one thread that computes for all tenants in turn, and gives memory back when it is idle."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Stopped", "TrunkThread", "give_memory_back"]

_IDLE_AFTER_S = 4.0
_QUANTUM_S = 2.0


_ALL_ARENAS_OF_JEMALLOC = b"arena.4096.purge"


def give_memory_back() -> None:
    """Return the heap's free pages to the system, where the C library (glibc) or jemalloc can.

    A tenant's small lasting tensors land in holes between freed activations, and the holes stay
    resident: without this each tenant costs 19 times its state (benchmarks/memory, docs/log.md).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or none
        process = ctypes.CDLL(None)
        if hasattr(process, "mallctl"):
            process.mallctl(_ALL_ARENAS_OF_JEMALLOC, None, None, None, 0)
        else:
            process.malloc_trim(0)


class Stopped(RuntimeError):
    """The server is on its way down; what was asked was not done."""


@dataclass(frozen=True)
class _Work:
    do: Callable[[], Any]
    begins: bool
    future: Future[Any] = field(default_factory=Future)


class TrunkThread:
    """Do what is handed in: a tenant's work in its order, and first the tenant that has had least.

    Start-time fair queueing: each tenant has a clock of the seconds that were computed for it, and
    the earliest clock is served. A tenant that comes back from a pause is put at the present: it
    gets no credit for time that it did not ask for.

    What was begun is finished first: no graph is begun for a tenant while another that has some
    waits to use them up, nor while it waits to begin more and is not a quantum ahead. Else the
    graphs of all tenants are alive at once, in memory that each forward touches anew, which took
    a quarter of the time of 32 tenants (docs/log.md). What begins no graph waits for nothing but
    its clock.
    """

    def __init__(
        self, holders: Callable[[], Collection[str]] = tuple, *, quantum_s: float = _QUANTUM_S
    ) -> None:
        """Start the thread.

        Args:
            holders: Gives the tenants that have graphs; asked by this thread only.
            quantum_s: How many seconds ahead of others a tenant may begin more graphs.
        """
        self._holders = holders
        self._quantum_s = quantum_s
        self._waiting: dict[str, deque[_Work]] = {}
        self._clocks: dict[str, float] = {}
        self._now = 0.0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="trunk", daemon=True)
        self._thread.start()

    def submit(
        self, do: Callable[[], Any], tenant: str = "", *, begins: bool = False
    ) -> Future[Any]:
        """Have something done in this tenant's turn.

        Args:
            do: What.
            tenant: Whose it is.
            begins: Whether it leaves a graph behind, which other work of this tenant will free.

        Raises:
            Stopped: If the thread was stopped.
        """
        work = _Work(do, begins)
        with self._changed:
            if self._stopped:
                raise Stopped("the trunk's thread was stopped")
            queue = self._waiting.setdefault(tenant, deque())
            if not queue:
                self._clocks[tenant] = max(self._clocks.get(tenant, 0.0), self._now)
            queue.append(work)
            self._changed.notify()
        return work.future

    def depth(self) -> int:
        """Return how many pieces of work wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def stop(self, deadline_s: float | None = None) -> None:
        """Finish what was handed in, for so many seconds at most, and stop."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(deadline_s)

    def _next(self, timeout_s: float | None) -> tuple[str, _Work] | None:
        """Return what is to be done now, `None` if nothing came in time."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._stopped, timeout_s)
            if not self._waiting:
                return None
            tenant = self._whose_turn()
            work = self._waiting[tenant].popleft()
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            return tenant, work

    def _whose_turn(self) -> str:
        tenant = min(self._waiting, key=self._clocks.__getitem__)
        self._now = self._clocks[tenant]
        if len(self._waiting) == 1 or not self._begins(tenant):
            return tenant
        latest_s, holders = self._now + self._quantum_s, self._holders()
        goes_on = [
            other
            for other in self._waiting
            if other in holders and (not self._begins(other) or self._clocks[other] < latest_s)
        ]
        return min(goes_on or [tenant], key=self._clocks.__getitem__)

    def _begins(self, tenant: str) -> bool:
        return self._waiting[tenant][0].begins

    def _run(self) -> None:
        is_tidy = True
        while True:
            item = self._next(None if is_tidy else _IDLE_AFTER_S)
            if item is None:
                if self._stopped:
                    return
                # Not after every step: that would cost a sixth of the trunk's time.
                give_memory_back()
                is_tidy = True
                continue
            tenant, work = item
            started_s = time.monotonic()
            try:
                work.future.set_result(work.do())
            except BaseException as error:
                work.future.set_exception(error)
            with self._changed:
                self._clocks[tenant] += time.monotonic() - started_s
            # What was done must not live on in this frame while the thread waits.
            del item, work
            is_tidy = False
