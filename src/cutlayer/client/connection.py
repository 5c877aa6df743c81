"""One session with a server: a channel, a stream, and the answers that are on their way."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from torch import Tensor

from cutlayer.client.diagnosis import why_unreachable
from cutlayer.client.remote_trunk import Question
from cutlayer.errors import BY_CODE, ConfigError, ConnectionFailed, CutlayerError, Refused
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import FRAME_BYTES, MAX_HEAD_BYTES, Assembler, Message, frames_of
from cutlayer.wire.tensors import attach_tensors, dtype_name, read_tensors, refuse_not_finite

__all__ = ["Address", "Connection", "Traffic"]

SERVICE = "cutlayer.v1.Trunk"
_MAX_ADAPTER_BYTES = 1 << 32


@dataclass(frozen=True)
class Address:
    """Where a server is and how to trust it."""

    server: str
    """`host:port`."""
    ca: Path | None = None
    """The authority that signed the server's certificate; the system's authorities if `None`."""
    cert: Path | None = None
    """The client's own certificate, for mutual TLS."""
    key: Path | None = None
    """The key of that certificate."""
    plaintext: bool = False
    """No TLS at all: everybody on the way reads the activations, which are the text."""

    def host_and_port(self) -> tuple[str, int]:
        """Return the two parts.

        Raises:
            ConfigError: If it is not `host:port`.
        """
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"server '{self.server}' is not an address: write host:port")
        return host.strip("[]"), int(port)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return the channel's credentials, `None` for plaintext.

        Raises:
            ConfigError: If a file is missing, or only one of certificate and key is given.
        """
        if self.plaintext:
            return None
        if (self.cert is None) != (self.key is None):
            raise ConfigError("split_cert and split_key go together: give both or neither")
        for name, path in (("ca", self.ca), ("cert", self.cert), ("key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigError(f"split_{name} '{path}' does not exist: check the path")
        return grpc.ssl_channel_credentials(
            *(path.read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        )


@dataclass
class Traffic:
    """What went over the link, and how long we waited for it."""

    sent_bytes: int = 0
    received_bytes: int = 0
    waited_s: float = 0.0
    trunk_s: float = 0.0
    """Seconds that the trunk computed for us."""
    queued_s: float = 0.0
    """Seconds that our requests waited for the trunk's turn."""


class Connection:
    """A session. Requests leave at once and in order; `Pending.wait` waits for one reply."""

    def __init__(
        self, address: Address, *, connect_timeout_s: float = 30.0, idle_timeout_s: float = 120.0
    ) -> None:
        """Open a channel and ask the server what it offers.

        Args:
            address: Where the server is.
            connect_timeout_s: Seconds to reach it.
            idle_timeout_s: Seconds without a byte, while we wait, after which it is dead.

        Raises:
            ConnectionFailed: If it cannot be reached; `TLSError` if that is for its certificate.
        """
        self.address = address
        self.traffic = Traffic()
        self.norms: Tensor | None = None
        self.session = ""
        self.parameters: dict[str, tuple[int, ...]] = {}
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._codec = "raw"
        self._outgoing: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._waiting: dict[int, Pending] = {}
        self._farewells: deque[pb.Head] = deque()
        self._sequence = 0
        self._send_lock = threading.Lock()
        self._failure: CutlayerError | None = None
        self._last_byte_s = time.monotonic()
        self._call: Any = None
        self._channel = _open_channel(address)
        self.offer: pb.Offer = self._unary("Describe", pb.DescribeRequest(), pb.Offer)

    # ------------------------------------------------------------------ control calls

    def _unary(self, method: str, request: Any, reply: Any, timeout_s: float | None = None) -> Any:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        try:
            return call(request, timeout=timeout_s or self._connect_timeout_s, wait_for_ready=False)
        except grpc.RpcError as error:
            raise self._explained(error) from None

    def _explained(self, error: grpc.RpcError) -> CutlayerError:
        """Return our error for gRPC's."""
        code, details = error.code(), error.details() or ""
        told = {item[0]: item[1] for item in (error.trailing_metadata() or ())}
        if "cutlayer-code" in told:
            return BY_CODE.get(str(told["cutlayer-code"]), Refused)(details)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return why_unreachable(self.address, details, self._connect_timeout_s)
        if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN):
            return ConnectionFailed(
                f"what answers at {self.address.server} is no cutlayer server: check the port"
            )
        return ConnectionFailed(f"the server at {self.address.server} failed: {details}")

    def open(self, asked: pb.OpenSessionRequest) -> pb.OpenSessionReply:
        """Agree with the server, and start the stream.

        Raises:
            Refused: Naming all that the two sides do not agree on.
        """
        # Making a tenant's place takes as long as the trunk's queue: idle, not connect, limits it.
        reply: pb.OpenSessionReply = self._unary(
            "OpenSession", asked, pb.OpenSessionReply, self._idle_timeout_s
        )
        self.session, self._codec = reply.session, asked.codec
        self.parameters = {p.name: tuple(p.shape) for p in reply.parameters}
        exchange = self._channel.stream_stream(f"/{SERVICE}/Exchange")
        self._call = exchange(self._requests(), metadata=(("cutlayer-session", self.session),))
        threading.Thread(target=self._receive, name="cutlayer-replies", daemon=True).start()
        return reply

    def close(self) -> None:
        """Give the session back and close the channel; closing twice is allowed."""
        if self.session and self._failure is None:
            asked = pb.CloseSessionRequest(session=self.session)
            # First the call, which waits until what the server keeps is kept; then the stream.
            with contextlib.suppress(CutlayerError):
                self._unary("CloseSession", asked, pb.CloseSessionReply, self._idle_timeout_s)
            self._outgoing.put(None)
        self.session = ""
        self._failure = self._failure or ConnectionFailed("the session was closed")
        self._channel.close()

    # ------------------------------------------------------------------ the stream

    def _requests(self) -> Iterator[bytes]:
        while True:
            frames = self._outgoing.get()
            if frames is None:
                return
            for frame in frames:
                yield frame
                self.traffic.sent_bytes += len(frame)
                self._last_byte_s = time.monotonic()

    def _receive(self) -> None:
        limit = max(self.offer.max_message_bytes, _MAX_ADAPTER_BYTES)
        assembler = Assembler(max_message_bytes=limit)
        try:
            for frame in self._call:
                self._last_byte_s = time.monotonic()
                self.traffic.received_bytes += len(frame)
                message = assembler.feed(frame)
                if message is not None and message.head.WhichOneof("verb") != "working":
                    self._deliver(message)
            self._fail(ConnectionFailed(f"the server at {self.address.server} closed the session"))
        except grpc.RpcError as error:
            self._fail(
                ConnectionFailed(
                    f"the link to {self.address.server} broke ({error.code().name.lower()}): start "
                    "the run again once the server is back"
                )
            )
        except CutlayerError as error:
            self._fail(error)

    def _deliver(self, message: Message) -> None:
        head = message.head
        if head.WhichOneof("verb") == "failure":
            error = BY_CODE.get(head.failure.code, Refused)(head.failure.message)
            pending = self._waiting.pop(head.sequence, None)
            if pending is None or pending.unattended:
                # Nobody waits for this one: the run must hear of it at its next request.
                self._fail(error)
            if pending is not None:
                pending.future.set_exception(error)
            return
        self.traffic.trunk_s += head.done.compute_s
        self.traffic.queued_s += head.done.queue_s
        pending = self._waiting.pop(head.sequence, None)
        if pending is not None:
            pending.future.set_result(read_tensors(message))

    def _fail(self, error: CutlayerError) -> None:
        self._failure = self._failure or error
        for pending in list(self._waiting.values()):
            if not pending.future.done():
                pending.future.set_exception(self._failure)
        self._waiting.clear()

    def request(
        self,
        head: pb.Head,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        unattended: bool = False,
    ) -> Pending:
        """Send a request and return its reply to come.

        Args:
            head: The request, its sequence number not yet set.
            tensors: Its tensors, which are copied into frames before this returns.
            unattended: Nobody will wait for the reply; a failure fails the session.
        """
        tensors = tensors or {}
        codecs = {
            name: self._codec if name in ("smashed", "gradient") else "int32" for name in tensors
        }
        parts = attach_tensors(head, tensors, codecs=codecs)
        with self._send_lock:
            if self._failure is not None:
                raise self._failure
            while self._farewells:
                self._put(self._farewells.popleft(), [], unattended=True)
            return self._put(head, parts, unattended=unattended)

    def _put(self, head: pb.Head, parts: list[memoryview], *, unattended: bool) -> Pending:
        self._sequence += 1
        head.sequence = self._sequence
        pending = Pending(self, head.sequence, unattended=unattended)
        self._waiting[head.sequence] = pending
        self._outgoing.put(list(frames_of(head, parts)))
        return pending

    def await_reply(self, pending: Pending) -> dict[str, Tensor]:
        """Wait for a reply for as long as bytes move.

        Raises:
            ConnectionFailed: If no byte moved for `idle_timeout_s`.
        """
        started_s = time.monotonic()
        try:
            while True:
                try:
                    return pending.future.result(timeout=0.5)
                except FutureTimeout:
                    silent_s = time.monotonic() - max(self._last_byte_s, started_s)
                    if silent_s > self._idle_timeout_s:
                        raise ConnectionFailed(
                            f"no byte from {self.address.server} for {self._idle_timeout_s:.0f} s "
                            "(split_idle_timeout_s): the server or the link is gone"
                        ) from None
        finally:
            self.traffic.waited_s += time.monotonic() - started_s

    # ------------------------------------------------------------------ what a Link does

    def forward(self, smashed_BTD: Tensor, question: Question) -> tuple[int, _Named]:
        """Send activations; return the request's number and the trunk's output to come."""
        head = pb.Head(
            forward=pb.Forward(
                training=question.training,
                keep_graph=question.keep_graph,
                wants_gradient=question.wants_gradient,
                seed=question.seed,
                autocast=dtype_name(question.autocast) if question.autocast else "",
                adapter_disabled=question.adapter_disabled,
                cache=question.cache,
                past_tokens=question.past_tokens,
                cache_rows=question.cache_rows,
            )
        )
        pending = self.request(head, {"smashed": smashed_BTD, **question.carried})
        return pending.sequence, _Named(pending, "trunk_out")

    def backward(self, forward: int, grad_BTD: Tensor) -> _Named:
        """Send the gradient of a forward's output; return the activations' gradient to come."""
        head = pb.Head(backward=pb.Backward(forward_sequence=forward))
        return _Named(self.request(head, {"gradient": grad_BTD}), "gradient")

    def discard(self, forward: int) -> None:
        """Say that a forward will have no backward."""
        self._tell(pb.Head(discard=pb.Discard(forward_sequence=forward)))

    def drop_cache(self, cache: int) -> None:
        """Say that a KV cache is not needed any more."""
        self._tell(pb.Head(drop_cache=pb.DropCache(cache=cache)))

    def _tell(self, head: pb.Head) -> None:
        # The collector may call this at any moment, within `request` too: it must take no lock.
        self._farewells.append(head)


@dataclass
class Pending:
    """A reply that is on its way."""

    connection: Connection
    sequence: int
    unattended: bool = False
    future: Future[dict[str, Tensor]] = field(default_factory=Future)

    def wait(self) -> dict[str, Tensor]:
        """Return the reply's tensors."""
        return self.connection.await_reply(self)


@dataclass(frozen=True)
class _Named:
    """One tensor of a reply that is on its way."""

    pending: Pending
    name: str

    def wait(self) -> Tensor | None:
        """Return the tensor, `None` if the reply has none.

        Raises:
            NotFinite: If it is NaN or infinite.
        """
        tensors = self.pending.wait()
        if "norms" in tensors:
            self.pending.connection.norms = tensors["norms"]
        tensor = tensors.get(self.name)
        if tensor is not None:
            refuse_not_finite(
                tensor, f"what the server sent ({self.name})", "lower the learning rate"
            )
        return tensor


def _open_channel(address: Address) -> grpc.Channel:
    host, port = address.host_and_port()
    credentials = address.credentials()
    options = [
        ("grpc.max_receive_message_length", FRAME_BYTES + MAX_HEAD_BYTES + 16),
        ("grpc.max_send_message_length", FRAME_BYTES + MAX_HEAD_BYTES + 16),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.enable_http_proxy", 0),
    ]
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)
