"""Cut a message into frames and put frames together again. Knows bytes and no tensors.

A message is a protobuf `Head` and a body: the bytes of its tensors, one after another. On the
stream it is one frame that begins with HEAD, then frames that begin with BODY until all the bytes
that the head promises have come. Messages of one direction never interleave.

    HEAD | length of the head, u32 little-endian | head | first bytes of the body
    BODY | next bytes of the body
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from cutlayer.errors import ProtocolError
from cutlayer.wire.cutlayer_pb2 import Head

__all__ = ["FRAME_BYTES", "MAX_HEAD_BYTES", "Assembler", "Message", "frames_of"]

FRAME_BYTES = 1 << 20
"""Size of a frame. 256 KiB to 1 MiB is where gRPC streams fastest (benchmarks/step_overhead)."""

MAX_HEAD_BYTES = 1 << 20

_HEAD, _BODY = b"\x01", b"\x02"
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Message:
    """A head and its body, whole."""

    head: Head
    body: memoryview


def frames_of(head: Head, parts: Iterable[memoryview]) -> Iterator[bytes]:
    """Yield the frames of one message, each of at most FRAME_BYTES.

    Args:
        head: The head, whose tensor metas describe `parts` in order.
        parts: The bytes of each tensor; every byte is copied once, into its frame.
    """
    packed = head.SerializeToString()
    frame = [_HEAD, _LENGTH.pack(len(packed)), packed]
    room = max(FRAME_BYTES - len(packed) - 5, 0)
    for part in parts:
        sent = 0
        while sent < len(part):
            if room == 0:
                yield b"".join(frame)
                frame, room = [_BODY], FRAME_BYTES - 1
            piece = part[sent : sent + room]
            frame.append(piece)  # type: ignore[arg-type]  # join takes any buffer
            sent += len(piece)
            room -= len(piece)
    yield b"".join(frame)


class Assembler:
    """Put the frames of one direction of one stream together.

    Nothing is allocated for a body before its head was checked against the limit.
    """

    def __init__(self, *, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._head: Head | None = None
        self._body = memoryview(b"")
        self._filled = 0

    def feed(self, frame: bytes) -> Message | None:
        """Take one frame; return the message that it completes, if it does.

        Raises:
            ProtocolError: If the frame is empty, of an unknown kind, out of place, longer than
                promised, or promises more than the limit.
        """
        kind, rest = frame[:1], memoryview(frame)[1:]
        if kind == _HEAD:
            rest = self._begin(rest)
        elif kind != _BODY:
            raise ProtocolError(f"frame begins with {kind!r}: expected {_HEAD!r} or {_BODY!r}")
        if self._head is None:
            raise ProtocolError("a body frame came where a head was expected")
        end = self._filled + len(rest)
        if end > len(self._body) or (kind == _BODY and not rest):
            promised = len(self._body)
            raise ProtocolError(
                f"message {self._head.sequence} has {end} bytes: its head promised {promised}"
            )
        self._body[self._filled : end] = rest
        self._filled = end
        if end < len(self._body):
            return None
        message = Message(self._head, self._body)
        # What was handed over is not kept: a silent tenant's last tensors would stay alive here.
        self._head, self._body, self._filled = None, memoryview(b""), 0
        return message

    def _begin(self, rest: memoryview) -> memoryview:
        if self._head is not None:
            raise ProtocolError(
                f"a head came while message {self._head.sequence} lacked "
                f"{len(self._body) - self._filled} bytes"
            )
        if len(rest) < _LENGTH.size:
            raise ProtocolError(f"head frame of {len(rest) + 1} bytes is too short")
        (length,) = _LENGTH.unpack(rest[: _LENGTH.size])
        rest = rest[_LENGTH.size :]
        if length > min(len(rest), MAX_HEAD_BYTES):
            raise ProtocolError(f"head of {length} bytes in a frame that has {len(rest)}")
        try:
            head = Head.FromString(bytes(rest[:length]))
        except DecodeError:
            raise ProtocolError(f"head of {length} bytes cannot be read") from None
        total = sum(meta.nbytes for meta in head.tensors)
        if total > self._max_message_bytes:
            raise ProtocolError(
                f"message {head.sequence} announces {total} bytes: the limit is "
                f"{self._max_message_bytes}; send smaller batches or more chunks"
            )
        self._head, self._body, self._filled = head, memoryview(bytearray(total)), 0
        return rest[length:]
