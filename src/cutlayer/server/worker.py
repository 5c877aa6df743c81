"""The one thread that computes for all tenants, and gives memory back when it has nothing to do."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["TrunkThread", "give_memory_back"]

_IDLE_AFTER_S = 4.0

_Work = tuple[Callable[[], Any], "Future[Any]"]


def give_memory_back() -> None:
    """Return the heap's free pages to the system, where the C library can (glibc).

    A tenant's small lasting tensors land in holes between freed activations, and the holes stay
    resident: without this each tenant costs 19 times its state (benchmarks/memory, docs/log.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class TrunkThread:
    """Do what is handed in, one after the other, in the order in which it came."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._stopped = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="trunk", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Have something done in its turn.

        Raises:
            RuntimeError: If the thread was stopped.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._stopped:
                raise RuntimeError("the trunk's thread was stopped")
            self._queue.put((work, future))
        return future

    def stop(self) -> None:
        """Finish what was handed in, and stop."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_tidy = True
        while True:
            try:
                item = self._queue.get(timeout=None if is_tidy else _IDLE_AFTER_S)
            except queue.Empty:
                # Not after every step: that would cost a sixth of the trunk's time.
                give_memory_back()
                is_tidy = True
                continue
            if item is None:
                return
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            # What was done must not live on in this frame while the thread waits.
            del item, work, future
            is_tidy = False
