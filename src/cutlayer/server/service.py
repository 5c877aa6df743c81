"""The gRPC handlers. They know frames and sessions, and no tensors."""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import grpc

from cutlayer.errors import AttestationFailed, CutlayerError, ProtocolError
from cutlayer.server.access import Gate
from cutlayer.server.session import Reply
from cutlayer.server.sessions import Sessions
from cutlayer.server.watch import tokens_in
from cutlayer.server.worker import Stopped
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import Assembler, Message, frames_of

__all__ = ["SERVICE", "TrunkService"]

log = logging.getLogger(__name__)

SERVICE = "cutlayer.v1.Trunk"
_WORKING_EVERY_S = 2.0
_ENDS_A_STEP = ("backward", "commit", "release", "discard", "optim_step", "zero_grad")


class TrunkService(grpc.GenericRpcHandler):
    """Serve the methods of `service Trunk` in cutlayer.proto."""

    def __init__(
        self,
        sessions: Sessions,
        offer: pb.Offer,
        gate: Gate,
        attest: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._sessions = sessions
        self._gate = gate
        self._offer = offer
        self._evidence_for = attest
        unary: dict[str, tuple[Callable[..., Any], Any]] = {
            "Attest": (self._attest, pb.AttestRequest),
            "Describe": (self._describe, pb.DescribeRequest),
            "OpenSession": (self._open, pb.OpenSessionRequest),
            "CloseSession": (self._close, pb.CloseSessionRequest),
        }
        self._handlers = {
            f"/{SERVICE}/{name}": grpc.unary_unary_rpc_method_handler(
                _told_by_code(do, self._refused),
                request_deserializer=kind.FromString,
                response_serializer=lambda reply: reply.SerializeToString(),
            )
            for name, (do, kind) in unary.items()
        }
        self._handlers[f"/{SERVICE}/Exchange"] = grpc.stream_stream_rpc_method_handler(
            self._exchange
        )

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method, for gRPC."""
        return self._handlers.get(handler_call_details.method)

    def _attest(self, asked: pb.AttestRequest, _context: grpc.ServicerContext) -> pb.AttestReply:
        # Whoever may connect may ask: a client shows its token only to a server that was proved.
        if self._evidence_for is None:
            raise AttestationFailed("this server offers no evidence of what it runs")
        return pb.AttestReply(evidence=self._evidence_for(asked.nonce))

    def _describe(self, _asked: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Offer:
        self._gate.tenant_of(context)
        return self._offer

    def _open(
        self, asked: pb.OpenSessionRequest, context: grpc.ServicerContext
    ) -> pb.OpenSessionReply:
        session = self._sessions.open(self._gate.tenant_of(context), asked)
        self._sessions.watch.opened(
            session.tenant, session.run, context.peer(), parameters=session.trunk.num_parameters
        )
        return pb.OpenSessionReply(
            session=session.identifier,
            parameters=[
                pb.Parameter(name=name, shape=list(parameter.shape))
                for name, parameter in session.trunk.parameters.items()
            ],
            keeps_adapter=self._sessions.keeps_adapter,
        )

    def _close(
        self, asked: pb.CloseSessionRequest, context: grpc.ServicerContext
    ) -> pb.CloseSessionReply:
        self._sessions.close(
            self._gate.tenant_of(context), asked.session, keep_rows=asked.keep_rows
        )
        return pb.CloseSessionReply()

    def _exchange(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        metadata = {item[0]: item[1] for item in context.invocation_metadata()}
        identifier = str(metadata.get("cutlayer-session", ""))
        received = str(metadata.get("cutlayer-received", "0"))
        rows_key = metadata.get("cutlayer-rows-bin", b"")
        stream = _Stream(self._sessions, requests)
        try:
            stream.attach(self._gate.tenant_of(context), identifier, received, rows_key)
        except CutlayerError as error:
            self._refused(context, error)
            yield from frames_of(_failure(error), [])
            return
        except Stopped:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        try:
            with self._gate.watching(context, stream.refuse):
                yield from stream.replies()
        finally:
            stream.detach()

    def _refused(self, context: grpc.ServicerContext, error: CutlayerError) -> None:
        self._sessions.watch.refused(self._gate.name_of(context), error, peer=context.peer())


class _Stream:
    """One session's stream: a thread reads requests, the trunk's thread works, gRPC's sends."""

    def __init__(self, sessions: Sessions, requests: Iterator[bytes]) -> None:
        self._sessions = sessions
        self._requests = requests
        self._outgoing: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._asked = self._answered = 0
        self._ended = threading.Event()
        self._room = threading.Semaphore(2 * sessions.limits.max_pending)
        self._held_bytes, self._held_less = 0, threading.Condition()

    def attach(self, tenant: str, identifier: str, received: str, rows_key: Any) -> None:
        """Take the place of the session's older stream.

        Args:
            tenant: Who calls.
            identifier: The session.
            received: The number of the last reply that has arrived.
            rows_key: Opens the rows that were sent once.

        Raises:
            Refused: If there is no such session.
            ProtocolError: If `received` is no number.
        """
        if not (received.isascii() and received.isdigit()):
            raise ProtocolError("cutlayer-received must be the number of a reply")
        self._session, self._number, first = self._sessions.attach(
            tenant, identifier, int(received), self._hang_up, bytes(rows_key)
        )
        for reply in first:
            self._outgoing.put(reply)
        self._answered = -len(first)

    def detach(self) -> None:
        """Leave the session to its next stream."""
        self._hang_up()
        self._session.detach(self._number)

    def _hang_up(self) -> None:
        self._ended.set()
        self._room.release()
        with self._held_less:
            self._held_less.notify_all()
        self._outgoing.put(None)

    def replies(self) -> Iterator[bytes]:
        """Yield the frames of the replies until the client has no more requests."""
        threading.Thread(target=self._read, name="exchange", daemon=True).start()
        while True:
            try:
                reply = self._outgoing.get(timeout=_WORKING_EVERY_S)
            except queue.Empty:
                if self._asked > self._answered:
                    yield from frames_of(pb.Head(working=pb.Working()), [])
                continue
            if reply is None:
                return
            self._answered += 1
            yield from frames_of(*reply)
            # A tenant that is silent from here on must not keep its last tensors alive.
            del reply
            if self._answered > 0:
                self._room.release()

    def refuse(self, error: CutlayerError) -> None:
        """Tell the client why it is not served any more, and end the stream."""
        self._sessions.watch.refused(self._session.tenant, error, run=self._session.run)
        self._outgoing.put((_failure(error), []))
        self._hang_up()

    def _read(self) -> None:
        assembler = Assembler(max_message_bytes=self._session.limits.max_message_bytes)
        last: Future[Any] | None = None
        try:
            for frame in self._requests:
                message = assembler.feed(frame)
                if message is None:
                    continue
                # A client that never reads its replies stops being read, and one whose requests
                # fill the memory while they wait.
                self._room.acquire()
                self._hold(len(message.body))
                if self._ended.is_set():
                    return
                self._asked += 1
                # Who has asked for too much is not read meanwhile: flow control holds it back.
                wait_for_tokens = self._sessions.desk.wait_for_tokens
                wait_for_tokens(self._session.tenant, tokens_in(message.head), self._ended)
                arrived_s = time.monotonic()
                work = functools.partial(self._answer, message, arrived_s)
                # No other verb has the flag: of them it is false.
                begins = message.head.forward.keep_graph
                fuser = self._sessions.fuser
                joint = None
                if fuser is not None:
                    joint = fuser.joint_of(self._session, message, self._is_current)
                ends = message.head.WhichOneof("verb") in _ENDS_A_STEP
                last = self._sessions.on_trunk(
                    work, self._session.tenant, begins=begins, ends=ends, joint=joint
                )
                del frame, message, work, joint
        except ProtocolError as error:
            self._outgoing.put((_failure(error), []))
        except Exception:  # the stream broke: gRPC raises its own, the pool may be shut down
            log.info("the stream of tenant %s ended", self._session.tenant)
        if last is not None:
            last.add_done_callback(lambda _done: self._outgoing.put(None))
        else:
            self._outgoing.put(None)

    def _hold(self, size_bytes: int) -> None:
        """Wait until a request fits beside those that wait: all take no more than one may."""
        most = self._session.limits.max_message_bytes
        with self._held_less:
            self._held_less.wait_for(
                lambda: (
                    self._ended.is_set()
                    or not self._held_bytes
                    or self._held_bytes + size_bytes <= most
                )
            )
            self._held_bytes += size_bytes

    def _is_current(self) -> bool:
        return self._session.stream == self._number

    def _answer(self, message: Message, arrived_s: float) -> None:
        try:
            self._do(message, arrived_s)
        finally:
            with self._held_less:
                self._held_bytes -= len(message.body)
                self._held_less.notify_all()

    def _do(self, message: Message, arrived_s: float) -> None:
        session = self._session
        if not self._is_current():
            return  # the client has come back on another stream, and says there what it asks
        done_before = message.head.sequence <= session.last_sequence
        reply = session.answer(message, arrived_s)
        self._outgoing.put(reply)
        if reply[0].HasField("missing"):
            self._hang_up()
        elif not done_before:
            self._sessions.watch.answered(
                session.tenant, session.run, message.head, reply[0], size_bytes=session.saved_bytes
            )


def _failure(error: CutlayerError) -> pb.Head:
    return pb.Head(failure=pb.Failure(code=error.code, message=str(error)))


def _told_by_code(
    do: Callable[..., Any], refused: Callable[[grpc.ServicerContext, CutlayerError], None]
) -> Callable[..., Any]:
    """Tell an error of ours by its code; of any other only that it happened."""

    def handle(asked: Any, context: grpc.ServicerContext) -> Any:
        try:
            return do(asked, context)
        except CutlayerError as error:
            refused(context, error)
            context.set_trailing_metadata((("cutlayer-code", error.code),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Stopped:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        except Exception as error:
            log.exception("a control call failed")
            context.abort(grpc.StatusCode.INTERNAL, f"the server failed ({type(error).__name__})")

    return handle
