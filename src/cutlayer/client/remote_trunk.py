"""The trunk as a module of the client's model, and the two autograd nodes that are its seam.

The training loop never calls the server. It calls `loss.backward()`, and the autograd engine
calls the two nodes here:

    _Send     forward: the activations leave              backward: wait for their gradient
    _Receive  forward: wait for the trunk's output        backward: its gradient leaves

With a batch in chunks, every chunk is sent before the first is awaited. In backward the engine
takes the youngest node first, so all tops run (and their gradients leave) before the first bottom
waits. That is the plain pipeline (docs/decisions/0002); where the model makes the loss itself,
pipeline.py calls the same two nodes chunk by chunk, by arrival.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import contextlib
import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from cutlayer.client.departures import Departures
from cutlayer.client.kv_caches import CacheNumbers
from cutlayer.client.send_once import Batch
from cutlayer.split.cut import Anatomy, cache_of, hidden_of
from cutlayer.split.entry import Entry
from cutlayer.wire.tensors import refuse_not_finite

__all__ = ["Answer", "Chunk", "Hold", "Link", "Question", "RemoteTrunk", "chunks_sent"]


@dataclass(frozen=True)
class Question:
    """What a forward tells the trunk besides the activations."""

    carried: dict[str, Tensor] = field(default_factory=dict)
    """`attention_mask` and `position_ids` as the model was called with."""
    training: bool = False
    keep_graph: bool = False
    wants_gradient: bool = False
    seed: int = 0
    autocast: torch.dtype | None = None
    adapter_disabled: bool = False
    cache: int = 0
    past_tokens: int = 0
    cache_rows: tuple[int, ...] = ()
    wanted_N: Tensor | None = None
    """The positions, row after row, of which the output is wanted; it is zero elsewhere."""
    rows: Batch | None = None
    """What each row is called, if rows are sent once."""


class Answer(Protocol):
    """A tensor that is on its way."""

    def wait(self) -> Tensor | None:
        """Return the tensor, `None` where none was asked for."""

    def arrived(self) -> bool:
        """Say whether `wait` would return at once."""


class Link(Protocol):
    """What a remote trunk asks of a connection; nothing here waits."""

    def forward(self, smashed_BTD: Tensor, question: Question) -> tuple[int, Answer]:
        """Send activations; return the request's number and the trunk's output to come."""

    def backward(
        self, forward: int, grad_BTD: Tensor, *, hold: int = 0, wants_norms: bool = True
    ) -> Answer:
        """Send the gradient of a forward's output; return the activations' gradient to come."""

    def commit(self, hold: int, factor: float, *, norms_are_of: int) -> None:
        """Have the held gradients, times a factor, added to the accumulated ones."""

    def release(self, hold: int) -> None:
        """Say that held gradients will not be committed."""

    def gradient_changes(self) -> int:
        """Count what has changed the trunk's gradients so far."""

    def wait_any(self, answers: Sequence[Answer]) -> None:
        """Wait until one of these has arrived."""

    def discard(self, forward: int) -> None:
        """Say that a forward will have no backward."""

    def drop_cache(self, cache: int) -> None:
        """Say that a KV cache is not needed any more."""


@dataclass(eq=False)
class Sent:
    """One chunk between its departure and its gradient's return."""

    number: int
    output: Answer
    gradient: Answer | None = None
    hold: int = 0
    wants_norms: bool = True
    step: int = 0
    records: list[str] = field(default_factory=list)

    def gradient_arrived(self) -> bool:
        """Say whether the gradient of the activations is there."""
        return self.gradient is not None and self.gradient.arrived()


@dataclass(frozen=True)
class Chunk:
    """A part of a batch that is on its way: what was sent, and where autograd goes on."""

    sent: Sent
    ticket: Tensor

    def cut_off(self) -> Chunk:
        """Return the same with a graph that ends at the seam."""
        ticket = self.ticket.detach().requires_grad_(self.ticket.requires_grad)
        return Chunk(self.sent, ticket)


class Hold:
    """Gradients at the trunk that wait for their commit; released with this object."""

    def __init__(self, link: Link, number: int) -> None:
        self.number = number
        self._link = link
        self._began_at = self._norms_are_of = link.gradient_changes()
        self._finalizer = weakref.finalize(self, link.release, number)

    def closed(self) -> None:
        """Say that the last backward was sent, and that its norms have come."""
        self._norms_are_of = self._link.gradient_changes()

    def commit(self, factor: float) -> None:
        """Add the gradients, times a factor, to the accumulated ones."""
        self._finalizer.detach()
        if self._norms_are_of == self._began_at:
            return  # neither bottom nor trunk trains: no gradient has left
        self._link.commit(self.number, factor, norms_are_of=self._norms_are_of)


class _ChunkSent(Exception):
    """Leaves the model's forward once a chunk is on its way."""


class _Reached(Exception):
    """Leaves the model's forward where the trunk would be called."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


class RemoteTrunk(nn.Module):
    """Stand for layers[lower:upper] in the client's model; called as the first of them is.

    Attributes:
        trains: Whether the trunk has an adapter that is trained.
        step: Optimizer steps done; with `seed` it determines the trunk's dropout.
        adapter_disabled: Run the trunk's base model.
        is_capturing: Whether a forward now ends where the trunk would be called.
        wanted_N: The positions of which the next forward wants the output; all by default.
    """

    def __init__(self, anatomy: Anatomy, layer: int, *, seed: int = 0) -> None:
        super().__init__()
        self.trains = True
        self.step = 0
        self.adapter_disabled = False
        self.wanted_N: Tensor | None = None
        self.seed = seed
        self.entry = Entry()
        self.departures = Departures()
        self.link: Link | None = None
        self._anatomy = anatomy
        self._layer = layer
        self._calls_in_step = 0
        self._sending: list[Chunk] | None = None
        self._receiving: Chunk | None = None
        self._hold_numbers = itertools.count(1)
        self._caches = CacheNumbers(layer)
        self.is_capturing = False
        self._rows: Batch | None = None
        # With a bottom that trains nothing autograd would see no reason to come back to us, and
        # the trunk would silently stay untrained. This leaf is the reason; it gets no gradient.
        self._anchor = torch.zeros(0, requires_grad=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trunk's output for these hidden states, in the family's form.

        Raises:
            NotFinite: If an activation that would leave is NaN or infinite.
            ConnectionFailed: If the server fell silent.
            Refused: If the server refuses.
        """
        if self._receiving is not None:
            return self._anatomy.as_returned(self._receive(self._receiving))
        if self.is_capturing:
            raise _Reached(hidden_of(args, kwargs))
        chunk = self._send(hidden_of(args, kwargs), cache_of(args, kwargs))
        if self._sending is not None:
            self._sending.append(chunk)
            raise _ChunkSent
        return self._anatomy.as_returned(self._receive(chunk))

    def new_hold(self) -> Hold:
        """Return a place at the trunk for gradients that wait for their commit."""
        assert self.link is not None
        return Hold(self.link, next(self._hold_numbers))

    def optimizer_stepped(self) -> None:
        """Begin a new step: the next forward is its first call."""
        self.step += 1
        self._calls_in_step = 0

    # ------------------------------------------------------------------ the two halves of a call

    def _send(self, hidden_BTD: Tensor, cache: Cache | None) -> Chunk:
        rows, leaving_BTD = self._rows, hidden_BTD.detach()
        if rows is not None:
            hidden_BTD = leaving_BTD  # it has passed no bottom, and a frozen one gets no gradient
            leaving_BTD = leaving_BTD[:0] if rows.hidden_BTD is None else rows.hidden_BTD
        grad = torch.is_grad_enabled() and (self.trains or hidden_BTD.requires_grad)
        refuse_not_finite(
            leaving_BTD,
            "the smashed activations",
            "nothing was sent; lower the learning rate, or look at the sample",
        )
        past_tokens = self._caches.past_tokens(cache)
        hidden_BTD = self.departures.defended(hidden_BTD, self.entry, past_tokens)
        assert self.link is not None
        question = Question(
            carried=dict(self.entry.carried),
            training=self.training,
            keep_graph=grad,
            wants_gradient=grad and hidden_BTD.requires_grad,
            seed=self._seed_of_call(),
            autocast=_autocast_dtype(hidden_BTD.device.type),
            adapter_disabled=self.adapter_disabled,
            wanted_N=self.wanted_N,
            rows=rows,
            **self._caches.fields(cache, hidden_BTD, self.link.drop_cache, grad=grad),
        )
        if grad:
            flight = _Flight(self.link, question)
            ticket = _Send.apply(hidden_BTD, self._anchor, flight)
            assert flight.sent is not None
            chunk = Chunk(flight.sent, ticket)
        else:
            number, output = self.link.forward(hidden_BTD.detach(), question)
            chunk = Chunk(Sent(number, output), hidden_BTD.new_zeros(0))
        chunk.sent.step = self.step
        chunk.sent.records = self.departures.sent(
            chunk.sent.number, self.step, hidden_BTD, self.entry, rows
        )
        return chunk

    def _receive(self, chunk: Chunk) -> Tensor:
        if chunk.ticket.requires_grad:
            received: Tensor = _Receive.apply(chunk.ticket, self.link, chunk.sent, self.departures)
            return received
        out_BTD = chunk.sent.output.wait()
        assert out_BTD is not None
        return out_BTD.to(chunk.ticket.device)

    @contextlib.contextmanager
    def sending(self) -> Iterator[list[Chunk]]:
        """While open, a forward ends when its activations have left; yields what is on its way."""
        self._sending = []
        try:
            yield self._sending
        finally:
            self._sending = None

    @contextlib.contextmanager
    def sending_rows(self, rows: Batch) -> Iterator[None]:
        """While open, a forward sends these rows in place of what comes to the trunk."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def at_the_cut(self, call: Callable[[], Any]) -> Tensor:
        """Run a call of the model until the trunk is reached; return what came there, (B, T, D)."""
        self.is_capturing = True
        try:
            call()
        except _Reached as reached:
            return reached.hidden_BTD
        finally:
            self.is_capturing = False
        raise AssertionError("the model has not called its trunk")

    @property
    def is_receiving(self) -> bool:
        """Whether a forward now goes on from the trunk's output."""
        return self._receiving is not None

    @contextlib.contextmanager
    def receiving(self, chunk: Chunk) -> Iterator[None]:
        """While open, a forward goes on with the output of this chunk."""
        self._receiving = chunk
        try:
            yield
        finally:
            self._receiving = None

    def _seed_of_call(self) -> int:
        if not self.training:
            return 0  # an evaluation between two steps must not move the dropout of the next
        call, self._calls_in_step = self._calls_in_step, self._calls_in_step + 1
        key = f"{self.seed}/{self.step}/{call}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


@dataclass
class _Flight:
    """What `_Send` is handed, and where it leaves what it sent."""

    link: Link
    question: Question
    sent: Sent | None = None


class _Send(torch.autograd.Function):
    """The activations leave; in backward their gradient comes back."""

    @staticmethod
    def forward(ctx: Any, smashed_BTD: Tensor, _anchor: Tensor, flight: _Flight) -> Tensor:
        number, output = flight.link.forward(smashed_BTD.detach(), flight.question)
        flight.sent = ctx.sent = Sent(number, output)
        ctx.device = smashed_BTD.device
        # If this graph is dropped without a backward, the trunk must drop its graph too.
        ctx.finalizer = weakref.finalize(flight.sent, flight.link.discard, number)
        return smashed_BTD.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> tuple[Tensor | None, None, None]:
        ctx.finalizer.detach()
        assert ctx.sent.gradient is not None
        grad_BTD = ctx.sent.gradient.wait()
        return (grad_BTD.to(ctx.device) if grad_BTD is not None else None), None, None


class _Receive(torch.autograd.Function):
    """The trunk's output arrives; in backward its gradient leaves."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, link: Link, sent: Sent, departures: Departures) -> Tensor:
        ctx.link, ctx.sent, ctx.departures = link, sent, departures
        out_BTD = sent.output.wait()
        assert out_BTD is not None
        departures.received(sent.number, sent.step, out_BTD)
        # Autograd hangs this node on what is returned. Were that the very tensor that `sent` holds,
        # the two would keep each other alive, and the trunk's graph with them.
        return out_BTD.detach().to(ticket.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_not_finite(
            grads[0],
            "the gradient at the upper cut",
            "the loss is NaN or infinite; nothing was sent; lower the learning rate, use bf16 "
            "instead of fp16, or look at the batch",
        )
        sent: Sent = ctx.sent
        leaving_BTD = ctx.departures.gradient(sent.number, sent.step, grads[0], sent.records)
        sent.gradient = ctx.link.backward(
            sent.number, leaving_BTD, hold=sent.hold, wants_norms=sent.wants_norms
        )
        return grads[0].new_zeros(0), None, None, None


def chunks_sent(remote: RemoteTrunk, calls: Sequence[Any]) -> list[Chunk]:
    """Run each call until its activations have left; return what is on its way, in order."""
    with remote.sending() as sent:
        for call in calls:
            with contextlib.suppress(_ChunkSent):
                call()
    return sent
