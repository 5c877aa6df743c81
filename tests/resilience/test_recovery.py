"""Whatever is killed, cut or parked, a run ends as the calm run does, bit for bit."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.proxy import Proxy
from cutlayer.errors import Refused
from cutlayer.server.access import Limits
from cutlayer.wire import cutlayer_pb2 as pb
from tests.resilience.test_savepoints import until
from tests.site import Loop, ServerProcess, Site, adapter_of, batch_of, equal, lora, site_of

STEPS = 5


def trained(site: Site, *, disturb: Callable[[int], None] | None = None, **settings: Any) -> Any:
    """Train a few steps of two batches each; return all losses, logits, norms and the adapter."""
    seen: list[Any] = []
    torch.manual_seed(0)  # of the dropout in the client's own layers
    with site.connect(seed=3, lease_s=60.0, **settings) as split:
        loop = Loop.over(split)
        for step in range(STEPS):
            if disturb:
                disturb(step)
            seen += loop.step(batch_of(2 * step), batch_of(2 * step + 1))
        seen.append(adapter_of(split))
    return seen


@pytest.fixture
def proxied(llama: Site) -> Iterator[tuple[Site, Proxy]]:
    """The shared server behind a proxy."""
    proxy = Proxy(llama.server.port)
    yield Site(llama.folder, llama.certs, _At(proxy.port)), proxy  # type: ignore[arg-type]
    proxy.close()


class _At:
    """A port where something listens."""

    def __init__(self, port: int) -> None:
        self.port = port


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_link_that_is_cut_loses_nothing(llama: Site, proxied: Any, chunks: int):
    """TCP resets at any moment of a run, within requests and replies, leave no trace in it."""
    site, proxy = proxied
    cutting = threading.Event()

    def keep_cutting() -> None:
        while not cutting.wait(0.13):
            proxy.cut()

    def disturb(step: int) -> None:
        if step == 0:
            threading.Thread(target=keep_cutting, daemon=True).start()
        time.sleep(0.3)

    rough = trained(site, chunks=chunks, disturb=disturb)
    cutting.set()

    assert equal(trained(llama, chunks=chunks), rough)


def test_a_partition_that_says_nothing_is_noticed(llama: Site, proxied: Any):
    """When no byte moves for the idle time, the client comes by another way."""
    site, proxy = proxied

    def partition(step: int) -> None:
        if step == 2:
            proxy.hold()
            threading.Timer(1.5, proxy.release).start()

    assert equal(trained(llama), trained(site, disturb=partition, idle_timeout_s=1.0))


def test_a_killed_server_goes_on_where_it_was(llama: Site, certs: Path, tmp_path: Path):
    """After SIGKILL the same command serves on, and the client asks again what was lost."""
    config = {"peft_config": lora(lora_dropout=0.3)}
    servers = [ServerProcess(llama.folder, certs, tmp_path)]
    port = servers[0].port
    site = Site(llama.folder, certs, servers[0])

    def again() -> None:
        servers[-1].kill()
        servers.append(ServerProcess(llama.folder, certs, tmp_path, port=port))

    def kill(step: int) -> None:
        if step == 2:
            threading.Timer(0.03, again).start()

    rough = trained(site, disturb=kill, **config)
    while len(servers) < 2:
        time.sleep(0.05)
    with ServerProcess(llama.folder, certs, tmp_path / "calm") as server:
        calm = trained(Site(llama.folder, certs, server), **config)
    servers[-1].kill()

    assert equal(calm, rough)


@pytest.mark.parametrize("train", [("bottom", "trunk", "top"), ("bottom", "top")])
def test_a_mark_shortens_what_is_sent_again(
    llama: Site, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any
):
    """With a mark on the disk only what came after it is asked again, and the end is the same."""
    monkeypatch.setattr("cutlayer.client.connection._MARK_AFTER_S", 0.0)
    server = ServerProcess(llama.folder, certs, tmp_path)
    site = Site(llama.folder, certs, server)
    with site.connect(seed=3, lease_s=60.0, train=train) as split:
        loop = Loop.over(split)
        for step in range(4):
            loop.step(batch_of(step))
        deadline = time.monotonic() + 20
        while split.connection._log.trimmed_to == 0 and time.monotonic() < deadline:
            with torch.no_grad():
                split(**batch_of(9))  # any reply tells what is durable
        was_marked = split.connection._log.trimmed_to > 0
        server.kill()
        again = ServerProcess(llama.folder, certs, tmp_path, port=server.port)
        loop.step(batch_of(4))
        rough, resent = adapter_of(split), split.connection.traffic.resent
    again.kill()
    with llama.connect(seed=3, train=train) as split:
        loop = Loop.over(split)
        for step in range(5):
            loop.step(batch_of(step))
        assert equal(adapter_of(split), rough)
    assert was_marked
    assert resent < 12


def test_forwards_that_had_no_backward_are_not_asked_again(llama: Site):
    """An evaluation whose author forgot `no_grad` leaves nothing in the log, a step or none."""
    with llama.connect() as split:
        for seed in range(4):
            split.train()(**batch_of(seed))
            gc.collect()
        split.connection.request(pb.Head(echo=pb.Echo())).wait()

        assert not split.connection._log._entries


def test_sigterm_drains(llama: Site, certs: Path, tmp_path: Path):
    """SIGTERM in a run exits 0 within seconds; the client waits and goes on by itself."""
    servers = [ServerProcess(llama.folder, certs, tmp_path)]
    codes: list[int] = []

    def drain() -> None:
        servers[-1].process.terminate()
        codes.append(servers[-1].process.wait(timeout=20))
        servers.append(ServerProcess(llama.folder, certs, tmp_path, port=servers[0].port))

    def disturb(step: int) -> None:
        if step == 2:
            threading.Timer(0.05, drain).start()

    rough = trained(Site(llama.folder, certs, servers[0]), disturb=disturb)
    while len(servers) < 2:
        time.sleep(0.05)
    servers[-1].kill()

    assert codes == [0]
    assert equal(trained(llama), rough)


def test_a_silent_tenant_is_parked_and_resumes_by_itself(llama: Site, certs: Path, tmp_path: Path):
    """Beyond the lease a session leaves the server's memory; its next call takes it up again."""
    site = site_of(llama.folder, certs, tmp_path, limits=Limits(lease_s=0.4))
    sessions = site.server.sessions  # type: ignore[union-attr]
    parked: list[bool] = []

    def fall_silent(step: int) -> None:
        if step in (2, 4):
            deadline = time.monotonic() + 10
            while sessions._open and time.monotonic() < deadline:
                time.sleep(0.05)
            parked.append(not sessions._open)

    rough = trained(site, disturb=fall_silent)
    site.server.stop()  # type: ignore[union-attr]

    assert parked == [True, True]
    assert equal(trained(llama), rough)


def test_generation_survives_a_cut(llama: Site, proxied: Any):
    """A KV cache at the server lives through a broken link, and through a new server."""
    site, proxy = proxied
    prompt = {k: v[:2] for k, v in batch_of(5).items() if k != "labels"}
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with llama.connect(seed=3) as split:
        calm = split.eval().generate(**prompt, **asked)
    cutting = threading.Event()

    def keep_cutting() -> None:
        while not cutting.wait(0.05):
            proxy.cut()

    with site.connect(seed=3, lease_s=60.0) as split:
        threading.Thread(target=keep_cutting, daemon=True).start()
        rough = split.eval().generate(**prompt, **asked)
        cutting.set()

    assert torch.equal(calm, rough)


def test_a_request_that_is_repeated_has_one_effect(llama: Site):
    """The same frames sent twice get the stored reply, and change nothing again."""
    from cutlayer.wire.frames import frames_of

    with llama.connect(seed=3) as split:
        loop = Loop.over(split)
        connection = split.connection
        put = connection._put

        def twice(head: Any, parts: Any, pending: Any) -> Any:
            pending = put(head, parts, pending)
            connection._outgoing.put(list(frames_of(head, parts)))
            return pending

        connection._put = twice
        found = [loop.step(batch_of(step)) for step in range(3)]
        found.append(adapter_of(split))
    with llama.connect(seed=3) as split:
        loop = Loop.over(split)
        calm: list[Any] = [loop.step(batch_of(step)) for step in range(3)]
        calm.append(adapter_of(split))

    assert equal(calm, found)


def test_a_session_of_another_tenant_is_unknown_even_when_parked(
    llama: Site, certs: Path, tmp_path: Path
):
    """Whose session it is stands in the journal too."""
    site = site_of(llama.folder, certs, tmp_path)
    with site.connect() as split:
        sessions = site.server.sessions  # type: ignore[union-attr]
        identifier = split.connection.session
        sessions.on_trunk(lambda: sessions._let_go(identifier)).result()
        with pytest.raises(Refused, match="no such session"):
            sessions.attach("another", identifier, 0, lambda: None)
    site.server.stop()  # type: ignore[union-attr]


def test_an_evaluation_that_is_parked_before_its_reply_arrives_gets_it(llama: Site, proxied: Any):
    """What leaves no trace in the state is asked again too, if its reply was lost on the way."""
    site, proxy = proxied
    sessions: Any = llama.server.sessions  # type: ignore[union-attr]
    begun, gate, seen = threading.Event(), threading.Event(), []

    def hold_up() -> None:
        begun.set()
        gate.wait()

    @torch.no_grad()
    def evaluate() -> None:
        seen.append(split(**batch_of(7), use_cache=False).logits)

    with site.connect(seed=3, run="lost", lease_s=60.0) as split:
        Loop.over(split).step(batch_of(0))
        split.eval()
        evaluate()
        (session,) = [each for each in sessions.in_memory() if each.run == "lost"]
        sessions.on_trunk(hold_up, session.tenant)
        assert begun.wait(60)  # else it is counted among those who wait
        asking = threading.Thread(target=evaluate)
        asking.start()
        try:
            until(lambda: sessions.waiting() == 1, within_s=60)
            sessions.on_trunk(lambda: sessions._park(session), session.tenant)
            proxy.cut()
            until(lambda: sessions.waiting() >= 3, within_s=60)  # the client is back, and waits
        finally:
            gate.set()
        asking.join()

    assert len(seen) == 2
    assert equal(*seen)


def test_what_a_server_keeps_at_the_end_is_all_that_was_trained(
    llama: Site, certs: Path, tmp_path: Path
):
    """Parked without a mark, a run is made again before its half of the adapter is saved."""
    site = site_of(llama.folder, certs, tmp_path, keep_adapter=True)
    sessions: Any = site.server.sessions  # type: ignore[union-attr]
    with site.connect(seed=3, run="kept", lease_s=60.0) as split, torch.no_grad():
        with torch.enable_grad():
            Loop.over(split).step(batch_of(0))
        split.eval()(**batch_of(1))
        (session,) = sessions.in_memory()
        trained = {name: t.clone() for name, t in session.trunk.export_adapter().items()}
        sessions.on_trunk(lambda: sessions._park(session)).result()
    kept = sessions._store.load("default", "kept", None).adapter
    site.server.stop()  # type: ignore[union-attr]

    assert equal(trained, kept)
