"""What strangers do to the port: honest tenants do not notice, and each stranger is refused."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from cutlayer.client.remote_trunk import Question
from cutlayer.errors import Refused
from cutlayer.server.access import Limits
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import Assembler, frames_of
from tests.site import Loop, ServerProcess, Site, adapter_of, batch_of, equal, site_of

EXCHANGE = "/cutlayer.v1.Trunk/Exchange"


@pytest.fixture(scope="module")
def site(llama: Site, certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server for strangers, which needs no certificate of theirs."""
    folder = tmp_path_factory.mktemp("strangers")
    served = site_of(llama.folder, certs, folder, limits=Limits(max_pending=4, lease_s=2.0))
    yield served
    served.server.stop(0)


def trained(site: Site) -> Any:
    """Train a little and return the adapter."""
    with site.connect(seed=3) as split:
        loop = Loop.over(split)
        for step in range(3):
            loop.step(batch_of(step))
        return adapter_of(split)


def channel_to(site: Site) -> grpc.Channel:
    """Open a channel as a program of a stranger's own would."""
    ca = (site.certs / "ca.pem").read_bytes()
    return grpc.secure_channel(site.address, grpc.ssl_channel_credentials(ca))


def told(site: Site, session: str, frames: Any) -> pb.Head:
    """Send raw frames on a stream and return the first failure that comes back."""
    with channel_to(site) as channel:
        call = channel.stream_stream(EXCHANGE)(
            iter(frames), metadata=(("cutlayer-session", session),)
        )
        assembler = Assembler(max_message_bytes=1 << 20)
        for frame in call:
            message = assembler.feed(frame)
            if message is not None and message.head.WhichOneof("verb") == "failure":
                return message.head
    raise AssertionError("nothing was refused")


@contextlib.contextmanager
def crowd(site: Site, count: int, speak: Callable[[socket.socket], None]) -> Iterator[None]:
    """Hold so many TCP connections open, each of which says something."""
    host, port = site.address.split(":")
    open_ones: list[socket.socket] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                one = socket.create_connection((host, int(port)), timeout=5)
                open_ones.append(one)
                speak(one)
        yield
    finally:
        for one in open_ones:
            one.close()


CROWDS: dict[str, Callable[[socket.socket], Any]] = {
    "silent": lambda one: None,
    "half a handshake": lambda one: one.sendall(b"\x16\x03\x01\x02\x00\x01\x00"),
    "another protocol": lambda one: one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n"),
    "noise": lambda one: one.sendall(bytes(range(256)) * 4),
}


@pytest.mark.parametrize("name", CROWDS)
def test_a_crowd_of_connections_does_not_keep_tenants_out(llama: Site, site: Site, name: str):
    """A tenant trains beside hundreds of connections that say nothing, half, or nonsense."""
    with crowd(site, 300, CROWDS[name]):
        assert equal(trained(llama), trained(site))


@pytest.mark.slow
def test_ten_thousand_connections(llama: Site, certs: Path, tmp_path: Path):
    """The same beside ten thousand silent ones, at a server of its own process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ServerProcess(llama.folder, certs, tmp_path) as server:
            site = Site(llama.folder, certs, server)
            with crowd(site, 10_000, CROWDS["silent"]):
                assert equal(trained(llama), trained(site))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_slow_loris_takes_no_turn(llama: Site, site: Site):
    """Streams that send a message a byte at a time hold up nobody."""
    with site.connect(run="loris") as split:
        head = pb.Head(sequence=1, echo=pb.Echo())
        frame = next(frames_of(head, []))
        stop = threading.Event()

        def slowly() -> Iterator[bytes]:
            yield frame[:1] + (len(frame) - 5 + 10).to_bytes(4, "little") + frame[5:]
            stop.wait(20)

        failed = []
        thread = threading.Thread(
            target=lambda: failed.append(told(site, split.connection.session, slowly()))
        )
        thread.start()
        assert equal(trained(llama), trained(site))
        stop.set()
        thread.join()

    assert failed[0].failure.code == "protocol"


def test_guessed_sessions_are_refused_beside_the_trunk(site: Site):
    """Who names a session that is none is told so while the trunk is busy with another's work."""
    busy = threading.Event()
    site.server.sessions.on_trunk(lambda: busy.wait(20), "someone")
    try:
        started_s = time.monotonic()
        head = told(site, "no-such-session", [])
        assert time.monotonic() - started_s < 10
    finally:
        busy.set()

    assert head.failure.code == "refused"


def test_replies_that_are_never_acknowledged_end_in_a_refusal(site: Site):
    """What the server stores for a client that never says what it received is bounded."""
    with site.connect(run="hoarder") as split:
        session = split.connection.session
        frames = [
            frame
            for n in range(1, 40)
            for frame in frames_of(pb.Head(sequence=n, follows=n - 1, echo=pb.Echo()), [])
        ]
        head = told(site, session, frames)

    assert head.failure.code == "protocol"
    assert "not acknowledged" in head.failure.message


def test_requests_that_wait_take_no_more_than_one_may(llama: Site, certs: Path, tmp_path: Path):
    """A stream is not read on while its requests wait for the trunk and fill the memory."""
    limits = Limits(max_message_bytes=1 << 20)
    site = site_of(llama.folder, certs, tmp_path, limits=limits)
    sessions, held, gate = site.server.sessions, threading.Event(), threading.Event()
    with site.connect() as split:
        sessions.on_trunk(lambda: held.set() or gate.wait(), "gate")
        held.wait()
        payload = {"payload": torch.ones(100_000)}  # 0.4 of 1.05 MB
        asked = [split.connection.request(pb.Head(echo=pb.Echo()), payload) for _ in range(8)]
        time.sleep(1.0)
        waiting = sessions.waiting()
        gate.set()
        answers = [pending.wait()["payload"] for pending in asked]
    site.server.stop(0)

    assert waiting == 2
    assert all(torch.equal(answer, payload["payload"]) for answer in answers)


def test_a_number_of_replies_that_is_none_is_refused(site: Site):
    """`cutlayer-received` is a number or the stream is refused."""
    with site.connect(run="words") as split, channel_to(site) as channel:
        metadata = (("cutlayer-session", split.connection.session), ("cutlayer-received", "all"))
        call = channel.stream_stream(EXCHANGE)(iter([]), metadata=metadata)
        heads = [Assembler(max_message_bytes=1 << 20).feed(frame) for frame in call]

    assert heads[0] is not None
    assert "must be the number of a reply" in heads[0].head.failure.message


def test_tls_of_an_old_version_is_refused(site: Site):
    """A client that offers nothing above TLS 1.1 gets no session."""
    host, port = site.address.split(":")
    context = ssl.create_default_context(cafile=str(site.certs / "ca.pem"))
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((host, int(port)), timeout=5) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw, server_hostname=host)


def test_a_batch_beyond_the_memory_ends_that_request_alone(
    folder_of: Any, certs: Path, tmp_path: Path
):
    """Out of memory is told in one sentence; this session and others go on."""
    served = site_of(folder_of("llama"), certs, tmp_path, attn_implementation="eager")
    tokens = 400_000  # attention over them would take terabytes
    eager = {"attn_implementation": "eager"}
    with served.connect(seed=3, **eager) as split, served.connect(**eager) as other:
        huge = torch.zeros(1, tokens, split.config.hidden_size)
        with pytest.raises(Refused, match="has not the memory for this batch"):
            split.remote_trunk.link.forward(huge, Question())[1].wait()
        loop, beside = Loop.over(split), Loop.over(other)
        loop.step(batch_of(0))
        beside.step(batch_of(1))
    served.server.stop(0)
