"""What the fuzzer calls: bytes of a stranger as the frames of one stream."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["cutlayer.wire"]):
    from cutlayer.errors import ProtocolError
    from cutlayer.wire.frames import Assembler
    from cutlayer.wire.tensors import read_tensors

LIMIT_BYTES = 1 << 16


def frames_in(data: bytes) -> list[bytes]:
    """Cut the fuzzer's bytes into frames: each begins with its length, two bytes."""
    frames = []
    while len(data) >= 2:
        size = int.from_bytes(data[:2], "little")
        frames.append(data[2 : 2 + size])
        data = data[2 + size :]
    return frames


def one_stream(data: bytes) -> None:
    """Feed a stream to the decoder, which may only say ProtocolError or give tensors."""
    assembler = Assembler(max_message_bytes=LIMIT_BYTES)
    try:
        for frame in frames_in(data):
            message = assembler.feed(frame)
            if message is not None:
                assert len(message.body) <= LIMIT_BYTES
                tensors = read_tensors(message)
                assert sum(t.nbytes for t in tensors.values()) <= 8 * LIMIT_BYTES
    except ProtocolError:
        return


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_stream)
    atheris.Fuzz()
