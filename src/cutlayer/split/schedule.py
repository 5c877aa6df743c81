"""How long a training step takes at one number of micro-chunks, and which number is best.

A step is replayed as the two sides do it: the client runs the next chunk's bottom while the server
has fewer than four requests to answer, else the top (loss and backward) of the chunk whose output
has come back, else the next chunk's bottom, else the bottom's backward of a chunk whose gradient
has come; the server computes one request at a time, in the order of arrival;
each direction of the link carries one message at a time, and a message arrives half a round trip
after its last byte has left. No network, no clock: numbers in, numbers out.

A pipeline that is full takes what its busiest resource takes; what a step takes beyond that is
filling, draining and waiting for the round trip. Where the seconds go is told by the longest chain
of waits, each link of which is work of one resource (`StepTime.chain_s`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field

__all__ = [
    "ENOUGH_ASKED",
    "RESOURCES",
    "Path",
    "StepTime",
    "Work",
    "best_chunks",
    "chunk_counts",
    "step_seconds",
]

RESOURCES = ("client", "server", "up", "down", "rtt")

ENOUGH_ASKED = 4
"""So many unanswered requests keep the server busy while a top runs and a message travels."""

CLOSE_ENOUGH = 1.01
"""Fewer chunks are taken where they are at most this much slower: each chunk has overheads."""


@dataclass(frozen=True)
class Work:
    """What one whole step asks of the two sides and of the link, all chunks together."""

    bottom_s: float
    """The client's bottom, forward."""
    top_s: float
    """The client's top: forward, loss and backward."""
    trunk_forward_s: float
    trunk_backward_s: float
    activations_up_bytes: float
    activations_down_bytes: float
    gradient_up_bytes: float
    gradient_down_bytes: float = 0.0
    """0 where the bottom is not trained: the reply then has no tensor."""
    bottom_backward_s: float = 0.0
    step_s: float = 0.0
    """Clipping and the client's optimizer, once a step."""
    trunk_step_s: float = 0.0
    """The trunk's optimizer, once a step."""
    client_s_per_chunk: float = 0.0
    """What each chunk costs the client beyond its share of the work."""
    server_s_per_chunk: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a number of at least 0")


@dataclass(frozen=True)
class Path:
    """The link between the two sides."""

    up_bytes_per_s: float = math.inf
    down_bytes_per_s: float = math.inf
    rtt_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.up_bytes_per_s > 0 and self.down_bytes_per_s > 0 and self.rtt_s >= 0):
            raise ValueError(f"{self}: bandwidths must be above 0 and the round trip at least 0")


@dataclass(frozen=True)
class StepTime:
    """The seconds of one step."""

    chunks: int
    seconds: float
    busy_s: dict[str, float] = field(default_factory=dict)
    """How long client, server, up and down work in a step."""
    chain_s: dict[str, float] = field(default_factory=dict)
    """The same along the longest chain of waits, the round trip included; sums to `seconds`."""
    bottoms_held: int = 1
    """Chunks whose bottom's graph the client holds at once, at most."""
    trunks_held: int = 1
    """Chunks whose graph the server holds at once, at most."""

    @property
    def binds(self) -> str:
        """The resource that the step waits for most."""
        return max(self.chain_s, key=self.chain_s.__getitem__)

    @property
    def utilisation(self) -> float:
        """Return the busiest resource's share of the step."""
        return max(self.busy_s.values()) / self.seconds if self.seconds else 1.0


def best_chunks(work: Work, path: Path, *, rows: int, most: int = 32) -> StepTime:
    """Return the step at the number of chunks that is best.

    It is the least number that is within 1% of the fastest.

    Args:
        work: What a step asks.
        path: The link.
        rows: Samples in a batch: a chunk has at least one.
        most: Chunks at most.

    Raises:
        ValueError: If there are no rows.
    """
    steps = [step_seconds(work, path, chunks) for chunks in chunk_counts(rows, most)]
    fastest = min(step.seconds for step in steps)
    return next(step for step in steps if step.seconds <= CLOSE_ENOUGH * fastest)


def chunk_counts(rows: int, most: int = 32) -> list[int]:
    """Return the numbers of chunks that differ for so many rows, in rising order.

    What a chunk takes is decided by its longest: 5, 6 and 7 chunks of 8 rows all have one of two.

    Raises:
        ValueError: If there are no rows.
    """
    if rows < 1 or most < 1:
        raise ValueError(f"rows={rows} and most={most} must be at least 1")
    longest = {math.ceil(rows / chunks) for chunks in range(1, min(rows, most) + 1)}
    return sorted({math.ceil(rows / size) for size in longest})


def step_seconds(work: Work, path: Path, chunks: int) -> StepTime:
    """Return what a step takes in so many chunks of equal size.

    Args:
        work: What a step asks.
        path: The link.
        chunks: Micro-chunks of a batch.

    Raises:
        ValueError: If chunks is less than 1.
    """
    if chunks < 1:
        raise ValueError(f"chunks={chunks} must be at least 1")
    return _Replay(work, path, chunks).run()


@dataclass(eq=False)
class _Done:
    """Something that took time, and what had to be over before it could begin."""

    resource: str
    end_s: float
    took_s: float
    after: _Done | None


class _Lane:
    """What does one thing at a time."""

    def __init__(self, resource: str) -> None:
        self.resource = resource
        self.last: _Done | None = None
        self.busy_s = 0.0

    def do(self, took_s: float, after: _Done | None) -> _Done:
        free_s = self.last.end_s if self.last else 0.0
        ready_s = after.end_s if after else 0.0
        because = self.last if free_s >= ready_s and self.last else after
        self.last = _Done(self.resource, max(free_s, ready_s) + took_s, took_s, because)
        self.busy_s += took_s
        return self.last


class _Replay:
    """One step, event by event. An event is (time, tie breaker, what, which chunk, its cause)."""

    def __init__(self, work: Work, path: Path, chunks: int) -> None:
        self._work, self._path, self._chunks = work, path, chunks
        self._lanes = {name: _Lane(name) for name in RESOURCES[:4]}
        self._events: list[tuple[float, int, str, _Done | None]] = []
        self._order = itertools.count()
        self._to_send = chunks
        self._outputs: deque[_Done] = deque()
        self._gradients: deque[_Done] = deque()
        self._asked: deque[tuple[str, _Done]] = deque()
        self._client_works = self._server_works = False
        self._unanswered = 0
        self._answered: _Done | None = None
        self._held = {"bottoms": [0, 0], "trunks": [0, 0]}  # now, and at most

    def run(self) -> StepTime:
        """Replay it all."""
        self._client_turn(None)
        while self._events:
            _time_s, _order, what, done = heapq.heappop(self._events)
            assert done is not None
            getattr(self, f"_{what}")(done)
        end = self._stepped()
        chain_s = dict.fromkeys(RESOURCES, 0.0)
        at: _Done | None = end
        while at is not None:
            chain_s[at.resource] += at.took_s
            at = at.after
        busy_s = {name: lane.busy_s for name, lane in self._lanes.items()}
        held = {f"{what}_held": most for what, (_now, most) in self._held.items()}
        return StepTime(self._chunks, end.end_s, busy_s, chain_s, **held)

    def _holds(self, what: str, more: int) -> None:
        now, most = self._held[what]
        self._held[what] = [now + more, max(most, now + more)]

    def _stepped(self) -> _Done:
        """Let both optimizers step; the next step's first request waits for the trunk's alone."""
        client = self._lanes["client"].do(self._work.step_s, self._answered)
        # Requests keep their order and nobody waits for the step's reply, so the trunk's optimizer
        # is over before the next batch comes, unless it takes longer than that batch's bottom.
        self._lanes["server"].busy_s += self._work.trunk_step_s
        ahead_s = self._work.bottom_s / self._chunks + self._path.rtt_s / 2
        late_s = max(self._work.trunk_step_s - ahead_s, 0.0)
        return _Done("server", client.end_s + late_s, late_s, client)

    def _at(self, done: _Done, what: str) -> None:
        heapq.heappush(self._events, (done.end_s, next(self._order), what, done))

    def _send(self, lane: str, of_bytes: float, after: _Done, what: str) -> None:
        rate = getattr(self._path, f"{lane}_bytes_per_s")
        left = self._lanes[lane].do(of_bytes / self._chunks / rate, after)
        half_s = self._path.rtt_s / 2
        self._at(_Done("rtt", left.end_s + half_s, half_s, left), what)

    # ------------------------------------------------------------------ the client

    def _client_turn(self, after: _Done | None) -> None:
        """Begin what is first in order, if the client is free."""
        if self._client_works:
            return
        work, each_s = self._work, self._work.client_s_per_chunk
        is_fed = not self._to_send or self._unanswered >= ENOUGH_ASKED
        if self._outputs and is_fed:
            took_s, after, then = work.top_s, self._outputs.popleft(), "top_done"
            each_s /= 2
        elif self._to_send:
            self._to_send -= 1
            self._holds("bottoms", 1)
            took_s, then = work.bottom_s, "bottom_done"
            each_s /= 2
        elif self._gradients:
            took_s, after, then = work.bottom_backward_s, self._gradients.popleft(), "back_done"
            each_s = 0.0
        else:
            return
        self._client_works = True
        self._unanswered += then != "back_done"
        self._at(self._lanes["client"].do(took_s / self._chunks + each_s, after), then)

    def _client_free(self, done: _Done) -> None:
        self._client_works = False
        self._client_turn(done)

    def _bottom_done(self, done: _Done) -> None:
        self._send("up", self._work.activations_up_bytes, done, "forward_asked")
        self._client_free(done)

    def _top_done(self, done: _Done) -> None:
        self._send("up", self._work.gradient_up_bytes, done, "backward_asked")
        self._client_free(done)

    def _back_done(self, done: _Done) -> None:
        self._holds("bottoms", -1)
        self._client_free(done)

    def _output_came(self, done: _Done) -> None:
        self._unanswered -= 1
        self._outputs.append(done)
        self._client_turn(done)

    def _gradient_came(self, done: _Done) -> None:
        self._unanswered -= 1
        self._answered = done
        if not self._work.bottom_backward_s:
            self._holds("bottoms", -1)
        if self._work.bottom_backward_s:
            self._gradients.append(done)
            self._client_turn(done)

    # ------------------------------------------------------------------ the server

    def _forward_asked(self, done: _Done) -> None:
        self._asked.append(("forward", done))
        self._server_turn()

    def _backward_asked(self, done: _Done) -> None:
        self._asked.append(("backward", done))
        self._server_turn()

    def _server_turn(self) -> None:
        if self._server_works or not self._asked:
            return
        kind, asked = self._asked.popleft()  # in the order of arrival
        self._holds("trunks", 1 if kind == "forward" else 0)
        self._server_works = True
        took_s = getattr(self._work, f"trunk_{kind}_s") / self._chunks
        each_s = self._work.server_s_per_chunk / 2
        self._at(self._lanes["server"].do(took_s + each_s, asked), f"{kind}_done")

    def _server_free(self) -> None:
        self._server_works = False
        self._server_turn()

    def _forward_done(self, done: _Done) -> None:
        self._send("down", self._work.activations_down_bytes, done, "output_came")
        self._server_free()

    def _backward_done(self, done: _Done) -> None:
        self._holds("trunks", -1)
        self._send("down", self._work.gradient_down_bytes, done, "gradient_came")
        self._server_free()
