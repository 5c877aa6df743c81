"""`chunks="auto"`: the number of micro-chunks, found in the first steps of a run.

The first steps are done in few chunks and then in many, and timed. What they took, and the link's
round trip and bandwidth, go into a replay of the step (split/schedule.py), which says how many
chunks are best. From then on the number stands: it decides the last bits of every sum, so it is
written into each checkpoint and a resumed run has it again.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from cutlayer.split.schedule import Path, StepTime, Work, best_chunks
from cutlayer.wire import cutlayer_pb2 as pb

if TYPE_CHECKING:
    from cutlayer.client.connection import Connection

__all__ = ["Laps", "Tuning", "chunks_or_tuning", "path_of"]

log = logging.getLogger(__name__)

_FEW, _MANY = 2, 8
_STEPS_EACH = 3  # the first of them warms up
_PROBE_BYTES = 1 << 20


class Laps:
    """The seconds of one batch at the client, by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark_s = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the seconds since the last lap to `name`."""
        now_s = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now_s - self._mark_s
        self._mark_s = now_s

    def of(self, *names: str) -> float:
        """Return the seconds that went to these."""
        return sum(self.seconds.get(name, 0.0) for name in names)


def path_of(connection: Connection) -> Path:
    """Measure the link by echoes. Both directions are taken for equally wide."""
    rtt_s = min(_echo_s(connection, 4) for _ in range(5))
    full_s = min(_echo_s(connection, _PROBE_BYTES) for _ in range(2))
    bytes_per_s = 2 * _PROBE_BYTES / max(full_s - rtt_s, 1e-6)
    return Path(bytes_per_s, bytes_per_s, rtt_s)


def _echo_s(connection: Connection, nbytes: int) -> float:
    payload = torch.zeros(nbytes, dtype=torch.uint8)
    started_s = time.perf_counter()
    connection.request(pb.Head(echo=pb.Echo()), {"payload": payload}).wait()
    return time.perf_counter() - started_s


class Tuning:
    """The search for the number of chunks.

    Attributes:
        found: The number, once it stands.
        expected: What the replay says of it; `None` for one that was told.
    """

    def __init__(self, connection: Connection) -> None:
        self.found: int | None = None
        self.expected: StepTime | None = None
        self._connection = connection
        self._most_rows = 0
        self._asked: tuple[int, int] | None = None
        self._before: dict[str, float] = {}
        self._took: dict[int, list[dict[str, float]]] = {}

    def fix(self, chunks: int) -> None:
        """Say what the number is, as a checkpoint does."""
        self.found = chunks

    def chunks_for(self, rows: int, last: Laps | None) -> int:
        """Return into how many chunks the batch that begins now is cut.

        Args:
            rows: Its rows.
            last: The laps of the batch before it.
        """
        if self.found is not None:
            return self.found
        if self._asked is not None and self._asked[0] == self._most_rows:
            self._note(self._asked[1], last)
        if rows > self._most_rows:
            # The last batch of an epoch is smaller; only the largest are compared.
            self._most_rows, self._took = rows, {}
        few, many = min(_FEW, self._most_rows), min(_MANY, self._most_rows)
        counts = [few] * _STEPS_EACH + [many] * _STEPS_EACH
        done = sum(map(len, self._took.values()))
        self._before = vars(self._connection.traffic).copy()
        if done == len(counts) and last is None:
            self.found = counts[0]
            log.warning("the model makes no loss itself: there are %d chunks", self.found)
            return self.found
        if done == len(counts):
            path = path_of(self._connection)
            self.expected = best_chunks(self._work(), path, rows=self._most_rows)
            self.found = self.expected.chunks
            log.info("%d chunks: %s", self.found, self.expected)
            return self.found
        self._asked = rows, counts[done]
        return counts[done]

    def _note(self, chunks: int, laps: Laps | None) -> None:
        traffic = vars(self._connection.traffic)
        names = ("sent_bytes", "received_bytes", "trunk_s", "trunk_forward_s")
        took = {name: traffic[name] - self._before[name] for name in names}
        laps = laps or Laps()
        took["bottom_s"] = laps.of("bottom", "ahead")
        took["top_s"] = laps.of("top")
        took["bottom_backward_s"] = laps.of("bottom_backward")
        took["client_s"] = sum(took[f"{part}_s"] for part in ("bottom", "top", "bottom_backward"))
        self._took.setdefault(chunks, []).append(took)

    def _work(self) -> Work:
        """Return what a step asks for, from the least that each part has taken."""
        few, many = min(self._took), max(self._took)
        best = {
            chunks: {name: min(step[name] for step in steps[1:]) for name in steps[0]}
            for chunks, steps in self._took.items()
        }
        least = best[few]

        def each(name: str) -> float:
            """Return what one more chunk costs."""
            more = best[many][name] - least[name]
            return max(more, 0.0) / max(many - few, 1)

        client_s, server_s = each("client_s"), each("trunk_s")
        # Activations and gradients go up in equal shapes; a bottom that trains has a third tensor.
        up_bytes = least["sent_bytes"] / 2
        backward_s = least["trunk_s"] - least["trunk_forward_s"]
        return Work(
            bottom_s=max(least["bottom_s"] - few * client_s / 2, 0.0),
            top_s=max(least["top_s"] - few * client_s / 2, 0.0),
            trunk_forward_s=max(least["trunk_forward_s"] - few * server_s / 2, 0.0),
            trunk_backward_s=max(backward_s - few * server_s / 2, 0.0),
            activations_up_bytes=up_bytes,
            activations_down_bytes=min(up_bytes, least["received_bytes"]),
            gradient_up_bytes=up_bytes,
            gradient_down_bytes=max(least["received_bytes"] - up_bytes, 0.0),
            bottom_backward_s=least["bottom_backward_s"],
            client_s_per_chunk=client_s,
            server_s_per_chunk=server_s,
        )


def chunks_or_tuning(chunks: int | str, connection: Connection) -> tuple[int, Tuning | None]:
    """Return how many chunks there are to begin with, and the search if one is asked for."""
    return (chunks, None) if isinstance(chunks, int) else (1, Tuning(connection))
