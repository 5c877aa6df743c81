"""The one thread that computes for all tenants in turn, and gives memory back when it is idle."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Joint", "Stopped", "Together", "TrunkThread", "give_memory_back"]

_IDLE_AFTER_S = 4.0
_QUANTUM_S = 2.0
_QUANTA_TO_END = 10
_LEAST_PATIENCE, _MOST_PATIENCE = 1 / 64, 1 / 4


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
class Joint:
    """What makes a piece of work one that can be done together with others' of the same key."""

    key: Hashable
    weight: int
    """Its part of what they take together, in any unit."""
    what: Any


class Together(Protocol):
    """Who does pieces of work together."""

    def awaited(self, joint: Joint) -> Collection[str]:
        """Return the tenants who may bring work of the same key soon."""

    def ahead(self, joints: Sequence[Joint]) -> AbstractContextManager[list[float]]:
        """Compute what they have in common; while open, each piece finds it done.

        Gives the seconds that each has taken. It never fails.
        """


@dataclass(frozen=True)
class _Work:
    do: Callable[[], Any]
    begins: bool
    ends: bool
    joint: Joint | None
    future: Future[Any] = field(default_factory=Future)


@dataclass
class _Gathering:
    """Work of one key, while more of it is waited for."""

    key: Hashable
    at_first: int = 0
    meanwhile: int = 0
    has_waited: bool = False


class TrunkThread:
    """Do what is handed in: a tenant's work in its order, and first the tenant that has had least.

    Start-time fair queueing: each tenant has a clock of the seconds that were computed for it, and
    the earliest clock is served. A tenant that comes back from a pause is put at the present: it
    gets no credit for time that it did not ask for.

    What was begun is finished first: no graph is begun for a tenant while another that has some
    waits to use them up, nor while it waits for anything else and is not a quantum ahead. Else the
    graphs of all tenants are alive at once, in memory that each forward touches anew, which took
    a quarter of the time of 32 tenants (docs/log.md). What begins no graph waits for nothing but
    its clock. What ends a step may be asked without end, too: others wait for it until its tenant
    is ten quanta ahead.

    Work with a `Joint` takes with it whatever waits at the head of other tenants' queues and has
    the same key; each tenant's clock takes its part. If some are awaited who have not come, and
    nobody else has work, it waits: for a quarter of what the last such work took at most, and
    half as long each time that nobody came. What an awaited tenant asks before its part is done
    first, unless its clock is as far ahead as above.
    """

    def __init__(
        self,
        holders: Callable[[], Collection[str]] = tuple,
        *,
        quantum_s: float = _QUANTUM_S,
        together: Together | None = None,
    ) -> None:
        """Start the thread.

        Args:
            holders: Gives the tenants that have graphs; asked by this thread only.
            quantum_s: How many seconds ahead of others a tenant may begin more graphs.
            together: Does work that has a `Joint`; asked by this thread only.
        """
        self._holders = holders
        self._quantum_s = quantum_s
        self._together = together
        self._patience = _MOST_PATIENCE
        self._last_took_s = 0.0
        self._gathering: _Gathering | None = None
        self._waiting: dict[str, deque[_Work]] = {}
        self._clocks: dict[str, float] = {}
        self._now = 0.0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="trunk", daemon=True)
        self._thread.start()

    def submit(
        self,
        do: Callable[[], Any],
        tenant: str = "",
        *,
        begins: bool = False,
        ends: bool = False,
        joint: Joint | None = None,
    ) -> Future[Any]:
        """Have something done in this tenant's turn.

        Args:
            do: What.
            tenant: Whose it is.
            begins: Whether it leaves a graph behind, which other work of this tenant will free.
            ends: Whether it frees a graph, or is what a step ends with.
            joint: With what others' work it may be done together.

        Raises:
            Stopped: If the thread was stopped.
        """
        work = _Work(do, begins, ends, joint if self._together else None)
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

    def _next(self, timeout_s: float | None) -> list[tuple[str, _Work]]:
        """Return what is to be done now, by whose it is; nothing if nothing came in time."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._stopped, timeout_s)
            if not self._waiting:
                return []
            return [(tenant, self._taken(tenant)) for tenant in self._with_company()]

    def _taken(self, tenant: str) -> _Work:
        work = self._waiting[tenant].popleft()
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        return work

    def _with_company(self) -> list[str]:
        """Return the tenants whose first work is to be done now, together if they are several."""
        tenant = self._whose_turn()
        joint = self._waiting[tenant][0].joint
        if joint is None or self._together is None:
            return [tenant]
        if self._gathering is None or self._gathering.key != joint.key:
            self._gathering = _Gathering(joint.key)
        gathering, awaited = self._gathering, set(self._together.awaited(joint))
        until_s = time.monotonic() + self._patience * self._last_took_s
        while True:
            alike = [t for t, queue in self._waiting.items() if _is_alike(queue[0].joint, joint)]
            missing = awaited - set(alike)
            # What comes before their part, such as an optimizer's step, is done meanwhile.
            before = [t for t in missing & self._waiting.keys() if self._may_go_before(t)]
            if before and gathering.meanwhile < 4 * len(awaited):
                gathering.meanwhile += 1
                return [min(before, key=self._clocks.__getitem__)]
            gathering.at_first = gathering.at_first or len(alike)
            is_idle = self._waiting.keys() <= set(alike) and not self._stopped
            left_s = until_s - time.monotonic()
            if not missing or not is_idle or left_s <= 0:
                break
            gathering.has_waited = True
            self._changed.wait(left_s)
        if gathering.has_waited:
            factor = 2.0 if len(alike) > gathering.at_first else 0.5
            self._patience = min(max(self._patience * factor, _LEAST_PATIENCE), _MOST_PATIENCE)
        self._gathering = None
        return alike

    def _may_go_before(self, tenant: str) -> bool:
        is_plain = self._waiting[tenant][0].joint is None and not self._begins(tenant)
        # Company is no reason for anybody to have more of the trunk's time than the others.
        return is_plain and self._clocks[tenant] < self._latest_s(tenant)

    def _whose_turn(self) -> str:
        tenant = min(self._waiting, key=self._clocks.__getitem__)
        self._now = self._clocks[tenant]
        if len(self._waiting) == 1 or not self._begins(tenant):
            return tenant
        holders = self._holders()
        goes_on = [o for o in self._waiting if o in holders and self._clocks[o] < self._latest_s(o)]
        return min(goes_on or [tenant], key=self._clocks.__getitem__)

    def _latest_s(self, tenant: str) -> float:
        """Return how far a tenant's clock may be for others to wait for what it does next."""
        quanta = _QUANTA_TO_END if self._waiting[tenant][0].ends else 1
        return self._now + quanta * self._quantum_s

    def _begins(self, tenant: str) -> bool:
        return self._waiting[tenant][0].begins

    def _run(self) -> None:
        is_tidy = True
        while True:
            items = self._next(None if is_tidy else _IDLE_AFTER_S)
            if not items:
                if self._stopped:
                    return
                # Not after every step: that would cost a sixth of the trunk's time.
                give_memory_back()
                is_tidy = True
                continue
            self._do_all(items)
            # What was done must not live on in this frame while the thread waits.
            del items
            is_tidy = False

    def _do_all(self, items: Sequence[tuple[str, _Work]]) -> None:
        started_s = time.monotonic()
        joints = [work.joint for _, work in items if work.joint is not None]
        alone = len(items) == 1 and (not joints or items[0][1].begins)
        if alone or self._together is None:
            self._do(*items[0])
        else:
            with self._together.ahead(joints) as seconds:
                for item, ahead_s in zip(items, seconds, strict=True):
                    self._do(*item, ahead_s)
        if joints:
            self._last_took_s = time.monotonic() - started_s

    def _do(self, tenant: str, work: _Work, ahead_s: float = 0.0) -> None:
        started_s = time.monotonic()
        try:
            work.future.set_result(work.do())
        except BaseException as error:
            work.future.set_exception(error)
        with self._changed:
            self._clocks[tenant] += ahead_s + time.monotonic() - started_s


def _is_alike(joint: Joint | None, other: Joint) -> bool:
    return joint is not None and joint.key == other.key
