"""One session with a server: a channel, a stream, and the answers that are on their way."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

import grpc
from torch import Tensor

from cutlayer.client.address import Address
from cutlayer.client.attested import open_channel
from cutlayer.client.diagnosis import why_unreachable
from cutlayer.client.remote_trunk import Question
from cutlayer.errors import BY_CODE, ConnectionFailed, CutlayerError, ProtocolError, Refused
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import Assembler, Message, frames_of
from cutlayer.wire.tensors import attach_tensors, dtype_name, read_tensors, refuse_not_finite

__all__ = ["Connection", "Traffic"]

SERVICE = "cutlayer.v1.Trunk"
_MAX_REPLY_BYTES = 1 << 32
_CHANGES_GRADIENTS = ("backward", "commit", "optim_step", "zero_grad")


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
            AttestationFailed: If a policy asks for evidence and it does not hold.
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
        self._gradient_changes = 0
        self._send_lock = threading.Lock()
        self._failure: CutlayerError | None = None
        self._last_byte_s = time.monotonic()
        self._call: Any = None
        self._channel, self.claims = open_channel(address, connect_timeout_s)
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
        # What the server says of itself must not decide how much memory it may take here.
        limit = min(max(self.offer.max_message_bytes, 1 << 30), _MAX_REPLY_BYTES)
        assembler = Assembler(max_message_bytes=limit)
        try:
            for frame in self._call:
                self._last_byte_s = time.monotonic()
                self.traffic.received_bytes += len(frame)
                message = assembler.feed(frame)
                if message is not None and message.head.WhichOneof("verb") != "working":
                    self._deliver(message)
                del frame, message
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
        except Exception as error:  # whatever a reply is made of, those who wait must hear of it
            reason = f"a reply of the server could not be read ({type(error).__name__})"
            self._fail(ProtocolError(f"{reason}: check that both sides run the same version"))

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
        self._gradient_changes += head.WhichOneof("verb") in _CHANGES_GRADIENTS
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
        self._wait_while_bytes_move([pending.future])
        return pending.future.result()

    def _wait_while_bytes_move(self, futures: Sequence[Future[Any]]) -> None:
        started_s = time.monotonic()
        while not wait(futures, timeout=0.5, return_when=FIRST_COMPLETED).done:
            silent_s = time.monotonic() - max(self._last_byte_s, started_s)
            if silent_s > self._idle_timeout_s:
                raise ConnectionFailed(
                    f"no byte from {self.address.server} for {self._idle_timeout_s:.0f} s "
                    "(split_idle_timeout_s): the server or the link is gone"
                )
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

    def backward(
        self, forward: int, grad_BTD: Tensor, *, hold: int = 0, wants_norms: bool = True
    ) -> _Named:
        """Send the gradient of a forward's output; return the activations' gradient to come."""
        asked = pb.Backward(forward_sequence=forward, hold=hold, norms=wants_norms)
        head = pb.Head(backward=asked)
        return _Named(self.request(head, {"gradient": grad_BTD}), "gradient")

    def commit(self, hold: int, factor: float, *, norms_are_of: int) -> None:
        """Have the held gradients, times a factor, added to the accumulated ones.

        The norms that came with the last backward under `hold` are true of this commit if it is
        by factor 1 and nothing has touched the gradients since; else it is waited for.
        """
        known = factor == 1.0 and norms_are_of == self.gradient_changes()
        head = pb.Head(commit=pb.Commit(hold=hold, factor=factor))
        pending = self.request(head, unattended=known)
        if not known:
            self.norms = pending.wait()["norms"]

    def release(self, hold: int) -> None:
        """Say that held gradients will not be committed."""
        self._tell(pb.Head(release=pb.Release(hold=hold)))

    def gradient_changes(self) -> int:
        """Count the requests so far that change the trunk's gradients."""
        return self._gradient_changes

    def wait_any(self, answers: Sequence[Any]) -> None:
        """Wait until one of these has arrived, for as long as bytes move."""
        self._wait_while_bytes_move([answer.pending.future for answer in answers])

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

    def arrived(self) -> bool:
        """Say whether the reply is there."""
        return self.pending.future.done()

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
