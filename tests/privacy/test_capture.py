"""What crosses the socket in training, read from a capture of its bytes, not from our own code."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import collections
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from cutlayer.cli.main import main
from cutlayer.errors import ProtocolError
from cutlayer.server.app import make_server
from cutlayer.wire.frames import Assembler
from tests.cli.test_by_hand import saved_tiny, write_rows, write_run
from tests.tokens import dataset

STEPS = 2
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Relay:
    """Carries bytes between a client and a server, and keeps those that go up."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.up: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                client, _address = self._listening.accept()
                server = socket.create_connection(self._server)
                self.up.append(bytearray())
                for ends in ((client, server, self.up[-1]), (server, client, bytearray())):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                kept += piece
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()


def data_of(capture: bytes) -> dict[int, bytes]:
    """Return what each HTTP/2 stream of a connection carried, without its frames (RFC 9113)."""
    assert capture.startswith(PREFACE)
    carried: dict[int, bytes] = collections.defaultdict(bytes)
    at = len(PREFACE)
    while at < len(capture):
        length = int.from_bytes(capture[at : at + 3])
        kind, flags, stream = struct.unpack(">BBI", capture[at + 3 : at + 9])
        body = capture[at + 9 : at + 9 + length]
        if kind == 0:  # DATA, whose first byte tells its padding if there is any
            carried[stream] += body[1 : len(body) - body[0]] if flags & 8 else body
        at += 9 + length
    return carried


def messages_of(carried: bytes) -> Iterator[bytes]:
    """Yield the gRPC messages of a stream: a flag, a length and so many bytes each."""
    at = 0
    while at < len(carried):
        compressed, length = struct.unpack(">BI", carried[at : at + 5])
        assert not compressed
        yield carried[at + 5 : at + 5 + length]
        at += 5 + length


def sent_up(relay: Relay) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """Return the verb of each message that went up, with the shapes of its tensors."""
    found = []
    for capture in relay.up:
        for carried in data_of(bytes(capture)).values():
            frames, assembler = list(messages_of(carried)), Assembler(max_message_bytes=1 << 30)
            with contextlib.suppress(ProtocolError):  # a control call, which has no frames
                for message in filter(None, map(assembler.feed, frames)):
                    shapes = {meta.name: tuple(meta.shape) for meta in message.head.tensors}
                    found.append((message.head.WhichOneof("verb"), shapes))
    return found


@pytest.fixture
def captured(folder_of: Any, tmp_path: Path) -> Iterator[Any]:
    """Return a function that trains under a profile and returns what went up, and the width."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    write_rows(tmp_path, [{"text": text} for text in dataset(8)["text"]])
    server = make_server(
        str(model),
        credentials=None,
        state_dir=tmp_path / "state",
        bottom_layers=1,
        top_layers=1,
        host="127.0.0.1",
        port=0,
    )
    relay = Relay(server.port)

    def train(profile: str) -> tuple[Any, int]:
        settings: dict[str, Any] = dict.fromkeys(("split_ca", "split_cert", "split_key"))
        settings |= {"split_plaintext": True, "split_privacy_profile": profile}
        config = write_run(tmp_path, model, relay.port, max_steps=STEPS, **settings)
        assert main(["train", "--config", str(config)]) == 0
        return sent_up(relay), AutoConfig.from_pretrained(model).hidden_size

    yield train
    relay.close()
    server.stop(grace_s=0.5)


def test_forward_only_sends_no_tensor_after_the_forward(captured: Any):
    """T-D3a: each step sends one (B, T, D) up, the activations, and nothing of that shape after."""
    messages, width = captured("forward_only")

    tensors = [(verb, shape) for verb, shapes in messages for shape in shapes.values()]
    wide = [verb for verb, shape in tensors if len(shape) == 3 and shape[-1] == width]
    assert wide == ["forward"] * STEPS
    assert {verb for verb, shapes in messages if shapes} == {"forward"}
    assert "backward" not in dict(messages)


def test_a_capture_shows_the_gradient_where_one_leaves(captured: Any):
    """The control: in the profile `open` the same capture has a gradient after each forward."""
    messages, width = captured("open")

    carrying = [(verb, shapes) for verb, shapes in messages if verb in ("forward", "backward")]
    assert [verb for verb, _shapes in carrying] == ["forward", "backward"] * STEPS
    assert all(any(s[-1] == width for s in shapes.values()) for _verb, shapes in carrying)
