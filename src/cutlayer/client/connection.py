"""One session with a server: a channel, a stream, and the answers that are on their way."""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import grpc
import torch
from torch import Tensor

from cutlayer.client.address import Address
from cutlayer.client.attested import open_channel
from cutlayer.client.calls import SERVICE, ask
from cutlayer.client.diagnosis import explained
from cutlayer.client.replay_log import ReplayLog
from cutlayer.client.replies import Pending, Traffic
from cutlayer.client.send_once import SendOnce
from cutlayer.errors import BY_CODE, ConnectionFailed, CutlayerError, ProtocolError, Refused
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import Assembler, Message, frames_of
from cutlayer.wire.statics import Statics
from cutlayer.wire.tensors import attach_tensors, read_tensors

__all__ = ["Connection"]

log = logging.getLogger(__name__)

_MAX_REPLY_BYTES = 1 << 32
_MARK_AFTER_BYTES, _MARK_AFTER_S = 32 << 20, 20.0
_FATAL = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)
_CHANGES_GRADIENTS = ("backward", "commit", "optim_step", "zero_grad")


class _RowsMissing(Exception):
    """The server lacks rows that a request named: come again and send them."""


class Connection:
    """A session. Requests leave at once and in order; `Pending.wait` waits for one reply.

    Attributes:
        once: The rows that are sent once, if the run does so.
    """

    def __init__(
        self,
        address: Address,
        *,
        connect_timeout_s: float = 30.0,
        idle_timeout_s: float = 120.0,
        lease_s: float = 600.0,
    ) -> None:
        """Open a channel and ask the server what it offers.

        Args:
            address: Where the server is.
            connect_timeout_s: Seconds to reach it.
            idle_timeout_s: Seconds without a byte, while we wait, after which the link is dead.
            lease_s: Seconds for which a lost server is tried again.

        Raises:
            ConnectionFailed: If it cannot be reached; `TLSError` if that is for its certificate.
            AttestationFailed: If a policy asks for evidence and it does not hold.
        """
        self.address = address
        self.traffic = Traffic()
        self.norms: Tensor | None = None
        self.once: SendOnce | None = None
        self.statics: dict[str, Statics] = {}  # what codecs know of the tensors that are named
        self.session = self.run = ""
        self.parameters: dict[str, tuple[int, ...]] = {}
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._lease_s = lease_s
        self._outgoing: queue.SimpleQueue[Iterable[bytes] | None] | None = None
        self._waiting: dict[int, Pending] = {}
        self._log = ReplayLog()
        self._farewells: deque[pb.Head] = deque()
        self._sequence = self._follows = self._received = 0
        self._gradient_changes = 0
        self._marked = (time.monotonic(), 0)  # when a mark was asked for, and at how many bytes
        self._was_attached = False
        self._closing, self._wanted = threading.Event(), threading.Event()
        self._send_lock = threading.Lock()
        self._failure: CutlayerError | None = None
        self._last_byte_s = time.monotonic()
        self._call: Any = None
        self._channel, self.claims = open_channel(address, connect_timeout_s)
        self._ask = functools.partial(ask, self._channel, address)
        # Making a tenant's place takes as long as the trunk's queue: idle, not connect, limits it.
        self._patiently = {"timeout_s": idle_timeout_s, "again_for_s": connect_timeout_s}
        self.offer: pb.Offer = self._ask(
            "Describe", pb.DescribeRequest(), pb.Offer, timeout_s=connect_timeout_s
        )

    def open(self, asked: pb.OpenSessionRequest) -> pb.OpenSessionReply:
        """Agree with the server, and start the stream.

        Raises:
            Refused: Naming all that the two sides do not agree on.
        """
        asked.rows = self.once.name if self.once is not None else ""
        reply: pb.OpenSessionReply = self._ask(
            "OpenSession", asked, pb.OpenSessionReply, **self._patiently
        )
        self.session, self.run = reply.session, asked.run
        self.parameters = {p.name: tuple(p.shape) for p in reply.parameters}
        threading.Thread(target=self._keep_up, name="cutlayer-link", daemon=True).start()
        return reply

    def close(self, *, keep_rows: bool = False) -> None:
        """Give the session back and close the channel; closing twice is allowed.

        Args:
            keep_rows: Let the server keep what was sent once: the run will be resumed.
        """
        if self.session and self.offer.keeps_adapter:
            # What is kept is the state as it is there: one that was parked must be made again.
            with contextlib.suppress(CutlayerError):
                last = self.request(pb.Head(echo=pb.Echo()), unattended=True)
                wait([last.future], timeout=self._idle_timeout_s)
        self._closing.set()
        if self.session and self._failure is None:
            asked = pb.CloseSessionRequest(session=self.session, keep_rows=keep_rows)
            # First the call, which waits until what the server keeps is kept; then the stream.
            with contextlib.suppress(CutlayerError):
                self._ask("CloseSession", asked, pb.CloseSessionReply, **self._patiently)
        self.session = ""
        self._failure = self._failure or ConnectionFailed("the session was closed")
        self._wanted.set()
        self._channel.close()

    # ------------------------------------------------------------------ the stream

    def _keep_up(self) -> None:
        """Have a stream for as long as the session lives: a thread of its own."""
        attempt, lost_s = 0, time.monotonic()
        while not self._closing.is_set():
            try:
                self._run_stream()
                cause = "the server ended the stream"
            except _RowsMissing:
                attempt, lost_s, self._was_attached = 0, time.monotonic(), False
                continue
            except grpc.RpcError as error:
                if error.code() in _FATAL:
                    return self._fail(explained(error, self.address, self._connect_timeout_s))
                cause = error.code().name.lower()
            except CutlayerError as error:
                return self._fail(error)
            except Exception as error:  # whatever a reply is made of, those who wait must hear
                reason = f"a reply of the server could not be read ({type(error).__name__})"
                remedy = "check that both sides run the same version"
                return self._fail(ProtocolError(f"{reason}: {remedy}"))
            if self._closing.is_set():
                return None
            if self._was_attached:
                attempt, lost_s, self._was_attached = 0, time.monotonic(), False
                with self._send_lock:
                    is_idle = not self._log.waits()
                if is_idle:
                    # Parked, or the server went away while nothing was asked: come again when
                    # something is.
                    self._wanted.wait()
                    lost_s = time.monotonic()
                else:
                    log.warning(
                        "the link to %s broke (%s): trying again", self.address.server, cause
                    )
            away_s = time.monotonic() - lost_s
            if away_s > self._lease_s:
                return self._fail(
                    ConnectionFailed(
                        f"the link to {self.address.server} broke ({cause}) and did not come back "
                        f"within {away_s:.0f} s (split_lease_s): start the run again with --resume "
                        "once the server is back"
                    )
                )
            self._closing.wait(min(0.05 * 2**attempt, 2.0, max(self._lease_s - away_s, 0.01)))
            attempt += 1
        return None

    def _run_stream(self) -> None:
        """Attach to the session, send what is to be sent, and read replies until the end."""
        outgoing: queue.SimpleQueue[Iterable[bytes] | None] = queue.SimpleQueue()
        metadata: list[tuple[str, str | bytes]] = [
            ("cutlayer-session", self.session),
            ("cutlayer-received", str(self._received)),
        ]
        if self.once is not None:
            metadata.append(("cutlayer-rows-bin", self.once.key))
        exchange = self._channel.stream_stream(f"/{SERVICE}/Exchange")
        self._call = call = exchange(self._requests(outgoing), metadata=metadata)
        # What the server says of itself must not decide how much memory it may take here.
        limit = min(max(self.offer.max_message_bytes, 1 << 30), _MAX_REPLY_BYTES)
        assembler = Assembler(max_message_bytes=limit)
        try:
            for frame in call:
                self._last_byte_s = time.monotonic()
                self.traffic.received_bytes += len(frame)
                message = assembler.feed(frame)
                if message is not None:
                    self._deliver(message, outgoing)
                del frame, message
        finally:
            with self._send_lock:
                self._outgoing = None
                self._wanted.clear()
            outgoing.put(None)
            call.cancel()

    def _requests(self, outgoing: queue.SimpleQueue[Iterable[bytes] | None]) -> Iterator[bytes]:
        while True:
            frames = outgoing.get()
            if frames is None:
                return
            for frame in frames:
                yield frame
                self.traffic.sent_bytes += len(frame)
                self._last_byte_s = time.monotonic()

    def _attached(
        self, told: pb.Attached, outgoing: queue.SimpleQueue[Iterable[bytes] | None]
    ) -> None:
        """Send again what the server has not done, and open the way for what comes."""
        with self._send_lock:
            if told.reached < self._log.trimmed_to:
                raise Refused(
                    f"the server stands at request {told.reached} and had request "
                    f"{self._log.trimmed_to} on its disk before: its state was lost; start the run "
                    "again with --resume"
                )
            coming = set(told.replies)
            for sequence in [s for s in self._waiting if s <= told.reached and s not in coming]:
                # It was done before the server's last mark, which is asked for when no tensor of an
                # earlier reply is waited for, and else written when none can be lost.
                self._waiting.pop(sequence).future.set_result({})
                self._log.answered(sequence)
            self._log.durable(told.durable)
            previous = told.reached
            for head, body in self._log.after(told.reached):
                head.follows, head.received = previous, self._received
                previous = head.sequence
                outgoing.put(frames_of(*self._whole(head, [body])))
                self.traffic.resent += 1
            self._follows = previous
            self._outgoing, self._was_attached = outgoing, True

    def _whole(self, head: pb.Head, parts: list[memoryview]) -> tuple[pb.Head, list[memoryview]]:
        """Return a request with the rows in it that the server is known not to hold."""
        return self.once.completed(head, parts) if self.once is not None else (head, parts)

    def _deliver(
        self, message: Message, outgoing: queue.SimpleQueue[Iterable[bytes] | None]
    ) -> None:
        head = message.head
        verb = head.WhichOneof("verb")
        if verb == "attached":
            return self._attached(head.attached, outgoing)
        if verb == "working":
            return None
        if verb == "missing" and self.once is not None:
            self.once.lost(head.missing)
            raise _RowsMissing
        if verb == "failure" and not head.sequence:
            raise BY_CODE.get(head.failure.code, Refused)(head.failure.message)
        # Before its waiter is let go.
        tensors = self._read(message) if verb == "done" else {}
        with self._send_lock:
            self._received = max(self._received, head.sequence)
            pending = self._waiting.pop(head.sequence, None)
            self._log.answered(head.sequence, refused=verb == "failure")
            self._log.durable(head.done.durable)
        if self.once is not None:
            self.once.not_kept(head.done.not_kept)
        if verb == "failure":
            error = BY_CODE.get(head.failure.code, Refused)(head.failure.message)
            if pending is None or pending.unattended:
                # Nobody waits for this one (or it was done before and now cannot be done again):
                # the run must hear of it at its next request.
                self._fail(error)
            if pending is not None:
                pending.future.set_exception(error)
            return None
        self.traffic.trunk_s += head.done.compute_s
        self.traffic.trunk_forward_s += head.done.compute_s if "trunk_out" in tensors else 0.0
        self.traffic.queued_s += head.done.queue_s
        if pending is not None:
            pending.future.set_result(tensors)
        return None

    def _read(self, message: Message) -> dict[str, Tensor]:
        asked = self._waiting.get(message.head.sequence)
        device = (asked and asked.device) or torch.device("cpu")
        tensors = read_tensors(message, statics=self.statics, device=device)
        if device.type == "cuda":
            # Who waits for it may be on another stream than this thread.
            torch.cuda.current_stream(device).synchronize()
        return tensors

    def _fail(self, error: CutlayerError) -> None:
        with self._send_lock:  # else a request that is being put would wait for ever
            self._failure = self._failure or error
            for pending in self._waiting.values():
                pending.future.set_exception(self._failure)
            self._waiting.clear()

    def request(
        self,
        head: pb.Head,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        codecs: Mapping[str, str] | None = None,
        unattended: bool = False,
    ) -> Pending:
        """Send a request and return its reply to come.

        Args:
            head: The request, its sequence number not yet set.
            tensors: Its tensors, which are copied before this returns.
            codecs: How they are written, by name; `raw` where none is named.
            unattended: Nobody will wait for the reply; a failure fails the session.
        """
        parts = attach_tensors(head, tensors or {}, codecs=codecs, statics=self.statics)
        if self.once is not None:
            self.once.leaving(head, parts)
            head, parts = self._whole(head, parts)
        with self._send_lock:
            if self._failure is not None:
                raise self._failure
            while self._farewells:
                self._put(self._farewells.popleft(), [], Pending(self, unattended=True))
            device = next((t.device for t in (tensors or {}).values()), None)
            return self._put(head, parts, Pending(self, unattended=unattended, device=device))

    def _put(self, head: pb.Head, parts: list[memoryview], pending: Pending) -> Pending:
        self._sequence += 1
        self._gradient_changes += head.WhichOneof("verb") in _CHANGES_GRADIENTS
        head.sequence, head.follows, head.received = self._sequence, self._follows, self._received
        self._follows = pending.sequence = self._sequence
        self._waiting[head.sequence] = pending
        self._log.add(head, parts)
        if self._outgoing is not None:
            self._outgoing.put(list(frames_of(head, parts)))
        self._wanted.set()
        return pending

    def mark_if_due(self) -> None:
        """Ask for a mark once there is much to be sent again should the server be lost."""
        since_s, since_bytes = self._marked
        now_s, added_bytes = time.monotonic(), self._log.added_bytes
        if added_bytes - since_bytes > _MARK_AFTER_BYTES or now_s - since_s > _MARK_AFTER_S:
            self._marked = now_s, added_bytes
            self.request(pb.Head(mark=pb.Mark()), unattended=True)

    def await_reply(self, pending: Pending) -> dict[str, Tensor]:
        """Wait for a reply, over a new stream if no bytes move on the old one.

        Raises:
            ConnectionFailed: If the server did not come back within `lease_s`.
        """
        self._wait_while_bytes_move([pending.future])
        return pending.future.result()

    def _wait_while_bytes_move(self, futures: Sequence[Future[Any]]) -> None:
        started_s = since_s = time.monotonic()
        while not wait(futures, timeout=0.5, return_when=FIRST_COMPLETED).done:
            if time.monotonic() - max(self._last_byte_s, since_s) > self._idle_timeout_s:
                # The link may be dead without a word (split_idle_timeout_s): try another.
                since_s = time.monotonic()
                if self._call is not None:
                    self._call.cancel()
        self.traffic.waited_s += time.monotonic() - started_s

    def tell(self, head: pb.Head) -> None:
        """Have a word go before the next request; takes no lock, so that a finalizer may call."""
        self._farewells.append(head)

    def gradient_changes(self) -> int:
        """Count the requests so far that change the trunk's gradients."""
        return self._gradient_changes

    def wait_any(self, pendings: Sequence[Pending]) -> None:
        """Wait until one of these has a reply, for as long as bytes move."""
        self._wait_while_bytes_move([pending.future for pending in pendings])
