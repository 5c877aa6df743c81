"""What was asked of the server and may have to be asked again.

The server's half of a run is a function of its requests. It writes a mark now and then; should it
be killed, it goes on from the mark and we send again what came after (docs/decisions/0012). A
request leaves the log when it cannot be needed: its reply is here and it changed nothing, or a
mark behind it is on the server's disk. The bodies lie in unlinked temporary files, so the log
costs disk and not memory, and goes with the process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from cutlayer.wire import cutlayer_pb2 as pb

__all__ = ["ReplayLog"]

_SEGMENT_BYTES = 16 << 20
_WITHOUT_TRACE = frozenset({"echo", "export_adapter", "keep_rows", "save_state", "mark", "retain"})


@dataclass
class _Segment:
    file: IO[bytes]
    size: int = 0


@dataclass
class _Entry:
    """A request: its head, and where its body lies."""

    head: pb.Head
    segment: _Segment | None
    offset: int
    nbytes: int
    kept: bytes = b""
    answered: bool = False

    def body(self) -> bytes:
        if self.segment is None:
            return self.kept
        self.segment.file.seek(self.offset)
        return self.segment.file.read(self.nbytes)


class ReplayLog:
    """The requests since the last mark, in their order.

    Attributes:
        trimmed_to: The last request that can never be sent again.
        added_bytes: Bytes of all bodies so far, those that were dropped included.
    """

    def __init__(self) -> None:
        self.trimmed_to = 0
        self.added_bytes = 0
        self._entries: dict[int, _Entry] = {}
        self._segment: _Segment | None = None

    def add(self, head: pb.Head, parts: Sequence[memoryview]) -> None:
        """Keep a request that is about to leave."""
        nbytes = sum(map(len, parts))
        entry = _Entry(head, None, 0, nbytes)
        if nbytes:
            try:
                self._write(entry, parts)
            except OSError:  # no room for temporary files: memory then
                self._segment, entry.segment = None, None
                entry.kept = b"".join(parts)
        self._entries[head.sequence] = entry
        self.added_bytes += nbytes
        if head.WhichOneof("verb") == "drop_cache":
            self._cache_dropped(head.drop_cache.cache)

    def _write(self, entry: _Entry, parts: Sequence[memoryview]) -> None:
        if self._segment is None or self._segment.size > _SEGMENT_BYTES:
            # Closed with the last entry that lies in it.
            self._segment = _Segment(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
        segment = self._segment
        segment.file.seek(segment.size)
        for part in parts:
            left = part
            while left:
                left = left[segment.file.write(left) :]
        entry.segment, entry.offset = segment, segment.size
        segment.size += entry.nbytes

    def answered(self, sequence: int, *, refused: bool = False) -> None:
        """Say that a reply has come; what was refused has changed nothing."""
        entry = self._entries.get(sequence)
        if entry is not None:
            entry.answered = True
            if refused or not _leaves_a_trace(entry.head):
                del self._entries[sequence]
            elif entry.head.WhichOneof("verb") == "discard":
                # The two together have left no trace, and there may never be a step and its mark.
                del self._entries[sequence]
                self._entries.pop(entry.head.discard.forward_sequence, None)

    def durable(self, sequence: int) -> None:
        """Say that all up to this request is on the server's disk."""
        if sequence > self.trimmed_to:
            self.trimmed_to = sequence
            for known in [known for known in self._entries if known <= sequence]:
                del self._entries[known]

    def after(self, sequence: int) -> Iterator[tuple[pb.Head, memoryview]]:
        """Yield the requests after one, to be sent again."""
        for entry in [e for known, e in self._entries.items() if known > sequence]:
            yield entry.head, memoryview(entry.body())

    def waits(self) -> bool:
        """Say whether a request has no reply yet."""
        return any(not entry.answered for entry in self._entries.values())

    def _cache_dropped(self, cache: int) -> None:
        for sequence, entry in list(self._entries.items()):
            asked = entry.head.forward
            is_its = entry.head.WhichOneof("verb") == "forward" and asked.cache == cache
            if is_its and not asked.keep_graph and entry.answered:
                del self._entries[sequence]


def _leaves_a_trace(head: pb.Head) -> bool:
    verb = head.WhichOneof("verb")
    if verb == "forward":
        return bool(head.forward.keep_graph or head.forward.cache)
    if verb == "drop_cache":
        return False
    return verb not in _WITHOUT_TRACE
