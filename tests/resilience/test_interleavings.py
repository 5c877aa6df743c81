"""Any order of work, cuts, kills, parkings and repetitions ends in the adapter of the calm run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from benchmarks.proxy import Proxy
from cutlayer.wire.frames import frames_of
from tests.site import Loop, Site, adapter_of, batch_of, equal, site_of

BATCHES = st.integers(0, 5)


class Interleavings(RuleBasedStateMachine):
    """One client against a server that is disturbed; what it trains is written down."""

    llama: Site

    @initialize(chunks=st.sampled_from([1, 2]))
    def begin(self, chunks: int) -> None:
        """Serve, and connect through a proxy."""
        self.state = Path(tempfile.mkdtemp(prefix="cutlayer-"))
        self.chunks = chunks
        self.site = site_of(self.llama.folder, self.llama.certs, self.state)
        self.proxy = Proxy(self.site.server.port)
        self.trained: list[tuple[str, int]] = []
        self.split = self.connected(f"127.0.0.1:{self.proxy.port}")
        self.loop = Loop.over(self.split)

    def connected(self, server: str) -> Any:
        """Return a client."""
        torch.manual_seed(0)
        return self.llama.connect(server=server, seed=3, chunks=self.chunks, lease_s=30.0)

    @rule(batch=BATCHES)
    def step(self, batch: int) -> None:
        """Forward, backward, step."""
        self.trained.append(("step", batch))
        do(self.loop, "step", batch)

    @rule(batch=BATCHES)
    def accumulate(self, batch: int) -> None:
        """Forward and backward only; the next step takes the gradients too."""
        self.trained.append(("accumulate", batch))
        do(self.loop, "accumulate", batch)

    @rule(batch=BATCHES)
    def look(self, batch: int) -> None:
        """Evaluate between steps."""
        with torch.no_grad():
            self.split(**batch_of(batch))

    @rule()
    def mark(self) -> None:
        """Have the server write a mark, if it is between steps."""
        from cutlayer.wire import cutlayer_pb2 as pb

        self.split.connection.request(pb.Head(mark=pb.Mark()), unattended=True)

    @rule()
    def cut(self) -> None:
        """Reset the link."""
        self.proxy.cut()

    @rule()
    def park(self) -> None:
        """Take the session out of the server's memory."""
        sessions, identifier = self.site.server.sessions, self.split.connection.session

        def park() -> None:
            if identifier in sessions._open:
                sessions._park(sessions._open[identifier])

        sessions.on_trunk(park, "default").result()

    @rule()
    def kill(self) -> None:
        """Lose the server's memory between two instructions; another serves from its folder."""
        old = self.site.server
        old.grpc_server.stop(0).wait()
        old.sessions._stopping.set()
        self.site = site_of(self.llama.folder, self.llama.certs, self.state)
        self.proxy.target = self.site.server.port
        self.proxy.cut()

    @rule()
    def repeat(self) -> None:
        """Send the last request's frames once more."""
        connection = self.split.connection
        with connection._send_lock:
            entries = list(connection._log._entries.values())
            if entries and connection._outgoing is not None:
                frames = frames_of(entries[-1].head, [memoryview(entries[-1].body())])
                connection._outgoing.put(list(frames))

    def teardown(self) -> None:
        """Compare with the calm run."""
        rough = adapter_of(self.split)
        self.split.close()
        self.proxy.close()
        self.site.server.stop(0)
        shutil.rmtree(self.state)
        with self.connected(self.llama.address) as calm:
            loop = Loop.over(calm)
            for kind, batch in self.trained:
                do(loop, kind, batch)
            assert equal(adapter_of(calm), rough)


def do(loop: Loop, kind: str, batch: int) -> None:
    """Train as told."""
    if kind == "step":
        loop.step(batch_of(batch))
    else:
        loop.model(**batch_of(batch)).loss.backward()


@pytest.mark.parametrize("examples", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_every_interleaving_ends_as_the_calm_run(llama: Site, examples: int):
    """The final adapter does not depend on what happened to link and server."""
    machine = type("Machine", (Interleavings,), {"llama": llama})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=14,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
