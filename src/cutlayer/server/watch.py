"""What happens at the server's edges, told to the audit log and to the metrics. No contents."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cutlayer.errors import CutlayerError, StorageError
from cutlayer.wire import cutlayer_pb2 as pb

if TYPE_CHECKING:
    from cutlayer.server.audit_log import AuditLog
    from cutlayer.server.metrics import Metrics

__all__ = ["Watch", "tokens_in"]

log = logging.getLogger(__name__)

_LEAVES = ("closed", "parked")
_PHASES = {"forward": "forward", "backward": "backward", "optim_step": "optim"}
_REFUSALS_A_MINUTE = 30
_MAX_REASON = 200


@dataclass
class _Flood:
    """Refusals of one kind within one minute."""

    minute: int
    count: int = 0


class Watch:
    """Tell what happens; without a log and without metrics it is silent."""

    def __init__(self, audit: AuditLog | None = None, metrics: Metrics | None = None) -> None:
        self.audit = audit
        self.metrics = metrics
        self._work: dict[tuple[str, str], Counter[str]] = {}
        self._floods: dict[tuple[str, str], _Flood] = {}
        self._lock = threading.Lock()

    def opened(self, tenant: str, run: str, peer: str, **sizes: int) -> None:
        """Tell that a session was opened.

        Raises:
            StorageError: If the audit log cannot be written: then nobody may come in.
        """
        if self.audit is not None:
            self.audit.write("opened", tenant=tenant, run=run, peer=peer, **sizes)

    def happened(self, event: str, tenant: str, run: str, **sizes: int) -> None:
        """Tell that something happened which cannot be undone: closed, parked, resumed, saved.

        When a session leaves the memory, how much was trained since it came goes with it.
        """
        work = self._work.pop((tenant, run), Counter()) if event in _LEAVES else Counter()
        if self.audit is None:
            return
        try:
            self.audit.write(event, tenant=tenant, run=run, **{**work, **sizes})
        except StorageError as error:
            log.error("%s of tenant %s is not in the audit log: %s", event, tenant, error)

    def refused(self, tenant: str, error: CutlayerError, *, run: str = "", peer: str = "") -> None:
        """Tell that something was refused; a flood of the same is told once a minute."""
        if self.metrics is not None:
            self.metrics.refused(tenant, error.code)
        held_back = self._held_back(tenant, error.code)
        if held_back is None or self.audit is None:
            return
        facts: dict[str, str | int] = {"code": error.code, "reason": str(error)[:_MAX_REASON]}
        facts |= {"run": run} if run else {}
        facts |= {"peer": peer} if peer else {}
        facts |= {"not_told_before": held_back} if held_back else {}
        try:
            self.audit.write("refused", tenant=tenant, **facts)
        except StorageError as failure:
            log.error("a refusal of tenant %s is not in the audit log: %s", tenant, failure)

    def _held_back(self, tenant: str, code: str) -> int | None:
        """Return how many of this kind were not told, `None` if this one is not told either."""
        minute = int(time.monotonic() / 60)
        with self._lock:
            flood = self._floods.get((tenant, code))
            if flood is None or flood.minute != minute:
                self._floods[tenant, code] = _Flood(minute, 1)
                return max(flood.count - _REFUSALS_A_MINUTE, 0) if flood else 0
            flood.count += 1
            return 0 if flood.count <= _REFUSALS_A_MINUTE else None

    def answered(
        self, tenant: str, run: str, asked: pb.Head, reply: pb.Head, *, size_bytes: int = 0
    ) -> None:
        """Tell that a request was answered, by what it asked for or by a refusal.

        Args:
            tenant: Whose it is.
            run: Of which run.
            asked: The request's head.
            reply: The reply's head.
            size_bytes: What was written to the disk for it, if anything was.
        """
        verb = asked.WhichOneof("verb") or "nothing"
        if reply.WhichOneof("verb") == "failure":
            self.refused(tenant, _told(reply.failure), run=run)
            return
        sent_bytes = sum(meta.nbytes for meta in reply.tensors)
        work = self._work.setdefault((tenant, run), Counter())
        work["steps"] += verb == "optim_step"
        work["tokens"] += tokens_in(asked)
        work["received_bytes"] += sum(meta.nbytes for meta in asked.tensors)
        work["sent_bytes"] += sent_bytes
        if self.metrics is not None:
            self.metrics.answered(
                tenant,
                phase=_PHASES.get(verb),
                tokens=tokens_in(asked),
                received_bytes=sum(meta.nbytes for meta in asked.tensors),
                sent_bytes=sent_bytes,
                queued_s=reply.done.queue_s,
                computed_s=reply.done.compute_s,
            )
        if verb == "save_state":
            step = asked.save_state.step
            self.happened("saved", tenant, run, step=step, size_bytes=size_bytes)
        elif verb == "export_adapter":
            self.happened("exported", tenant, run, size_bytes=sent_bytes)
        elif verb == "import_adapter":
            received = sum(meta.nbytes for meta in asked.tensors)
            self.happened("imported", tenant, run, size_bytes=received)


def tokens_in(asked: pb.Head) -> int:
    """Return how many tokens a forward asks the trunk to compute, padding included; else 0."""
    if asked.WhichOneof("verb") != "forward":
        return 0
    if asked.forward.rows:
        return len(asked.forward.rows) * int(asked.forward.row_tokens)
    shapes = [meta.shape for meta in asked.tensors if meta.name == "smashed"]
    return int(shapes[0][0] * shapes[0][1]) if shapes and len(shapes[0]) == 3 else 0


def _told(failure: pb.Failure) -> CutlayerError:
    error = CutlayerError(failure.message)
    error.code = failure.code
    return error
