"""Quotas: what exceeds them waits or is refused with both numbers, and nobody else feels it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.main import main
from cutlayer.errors import OverQuota
from cutlayer.server.quotas import QUOTAS, Bucket, Desk, Quotas
from cutlayer.server.tenants import Register
from cutlayer.wire import cutlayer_pb2 as pb
from tests.site import Loop, Site, batch_of, lora, site_of


def test_over_any_time_no_more_passes_than_the_rate():
    """Whatever is asked for, in time t pass at most rate x t, the burst and one request more."""
    draws, now_s = random.Random(3), [0.0]
    bucket, rate = Bucket(clock=lambda: now_s[0]), 10.0
    passed: list[tuple[float, int]] = []
    for _ in range(3000):
        tokens = draws.choice([1, 5, 400])
        while wait_s := bucket.take(tokens, 600):
            now_s[0] += wait_s * draws.uniform(0.5, 1.01) + 1e-3
        passed.append((now_s[0], tokens))
        now_s[0] += draws.choice([0.0, 0.0, 0.1, 30.0])

    for first in range(0, len(passed), 50):
        total = 0
        for at_s, tokens in passed[first:]:
            total += tokens
            assert total <= rate * (at_s - passed[first][0] + 5.0) + tokens + 400 + 1e-6


def test_a_waiting_tenant_goes_when_its_stream_ends():
    """Who waits for tokens is let go at once when its stream ends."""
    desk, ended = Desk(Quotas(tokens_per_minute=1)), threading.Event()
    desk.wait_for_tokens("ward-a", 1000, ended)
    threading.Timer(0.2, ended.set).start()

    started_s = time.monotonic()
    assert desk.wait_for_tokens("ward-a", 1, ended)
    assert time.monotonic() - started_s < 5.0


def test_quotas_of_a_tenants_own_stand_over_the_servers(tmp_path: Path):
    """`cutlayer tenants limit` changes a quota while the server runs; 0 takes it away."""
    from cutlayer.server.database import Journal

    register = Register(Journal(tmp_path))
    register.add("ward-a", {"rank": 4})
    desk = Desk(Quotas(rank=8, sessions=2), register.quotas_of)

    assert desk.of("ward-b") == Quotas(rank=8, sessions=2)
    assert desk.of("ward-a") == Quotas(rank=4, sessions=2)
    words = ["ward-a", "--quota_rank", "0", "--quota_sessions", "5", "--state_dir", str(tmp_path)]
    assert main(["tenants", "limit", *words]) == 0
    time.sleep(0.4)
    assert desk.of("ward-a") == Quotas(rank=0, sessions=5)


# ---------------------------------------------------------------------- through a server


@pytest.fixture(scope="module")
def limited(folder_of: Any, certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server whose tenants have no quotas but their own."""
    state_dir = tmp_path_factory.mktemp("limited")
    site = site_of(folder_of("llama"), certs, state_dir, auth="token")
    yield site
    site.server.stop(grace_s=0.5)


@pytest.fixture
def model(limited: Site, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A run of a tenant that has no quotas yet."""
    name, register = request.node.name, limited.server.gate.register
    token = register.add(name)
    with limited.connect(token=token, run="mine") as connected:
        connected.limit = lambda **quotas: register.limit(name, quotas)
        connected.token = token
        connected.session = limited.server.sessions.in_memory(name)[0]
        yield connected


def test_sessions_and_rank(limited: Site, model: Any):
    """A second session and a larger rank are refused with both numbers; one less is let in."""
    model.limit(sessions=1, rank=4)

    with pytest.raises(OverQuota, match="2 sessions open would exceed this tenant's quota of 1"):
        limited.connect(token=model.token, run="second")
    model.limit(sessions=2)
    with pytest.raises(OverQuota, match=r"5 as the rank of a LoRA .* quota of 4"):
        limited.connect(token=model.token, run="second", peft_config=lora(r=5))
    limited.connect(token=model.token, run="second").close()


def test_tokens_in_one_batch(model: Any):
    """A batch of 44 tokens is refused at a quota of 43, and trains at 44."""
    model.limit(batch_tokens=43)
    with pytest.raises(OverQuota, match=r"44 tokens in one forward .* quota of 43"):
        model(**batch_of(1))
    model.limit(batch_tokens=44)

    Loop.over(model).step(batch_of(1))


def test_forwards_that_wait(model: Any):
    """A third forward without a backward is refused at a quota of 2, and let in after one."""
    model.limit(pending=2)
    model.train()
    first, _second = model(**batch_of(1)).loss, model(**batch_of(2)).loss
    with pytest.raises(OverQuota, match=r"3 forwards waiting for their backward .* quota of 2"):
        model(**batch_of(3))

    first.backward()
    model(**batch_of(3)).loss.backward()


def test_memory(model: Any):
    """A graph too large is refused and freed; a smaller batch of the same run trains on."""
    session = model.session
    idle_bytes = session.memory.memory_bytes
    model.train()
    output = model(**batch_of(1, rows=2))
    small_bytes = session.memory.memory_bytes - idle_bytes
    output.loss.backward()
    assert session.memory.memory_bytes == idle_bytes
    model.limit(memory_bytes=idle_bytes + 2 * small_bytes)

    for _ in range(2):  # measured the first time, foreseen the second
        with pytest.raises(OverQuota, match=r"\d+ bytes of memory .* quota of \d+"):
            model(**batch_of(1, rows=8))
        assert session.memory.memory_bytes == idle_bytes
    model(**batch_of(1, rows=2)).loss.backward()


def test_a_graph_is_counted_as_what_it_keeps(model: Any):
    """A graph counts more than its activations, and about twice as much for twice the rows."""
    session = model.session
    model.train()
    sizes = []
    for rows in (2, 4):
        before = session.memory.graph_bytes
        loss = model(**batch_of(1, rows=rows)).loss
        sizes.append(session.memory.graph_bytes - before)
        loss.backward()

    smashed_bytes = 2 * 11 * session.width * 4
    assert sizes[0] > 10 * smashed_bytes
    assert 1.8 < sizes[1] / sizes[0] < 2.2
    assert session.memory.graph_bytes == 0


def test_saved_states(model: Any):
    """A state that would take more than the quota is refused; one within it is saved."""
    Loop.over(model).step(batch_of(1))
    model.limit(checkpoint_bytes=1000)
    save = model.connection.request
    with pytest.raises(OverQuota, match=r"\d+ bytes of saved states .* quota of 1000"):
        save(pb.Head(save_state=pb.SaveState(step=1))).wait()
    model.limit(checkpoint_bytes=10_000_000)

    save(pb.Head(save_state=pb.SaveState(step=1))).wait()


def test_tokens_a_minute_wait(limited: Site, model: Any):
    """Beyond its rate a tenant waits, is told that the server is alive, and loses nothing."""
    loop = Loop.over(model)
    loop.step(batch_of(1))
    # 88 tokens a second, 440 at once: of 616 tokens more than 100 must wait.
    model.limit(tokens_per_minute=88 * 60)
    started_s = time.monotonic()
    for number in range(14):
        loop.step(batch_of(number))

    assert time.monotonic() - started_s > 1.2
    token = limited.server.gate.register.add("ward-free")
    with limited.connect(token=token) as other:
        started_s = time.monotonic()
        Loop.over(other).step(batch_of(1))
        assert time.monotonic() - started_s < 5.0


def test_every_quota_is_a_flag(capsys: pytest.CaptureFixture[str]):
    """`serve` and `tenants add` have a flag for each quota, and refuse a negative one."""
    assert main(["tenants", "add", "a", "--quota_rank", "-1", "--state_dir", "/nowhere"]) == 2
    assert "--quota_rank -1" in capsys.readouterr().err
    for verb in (["serve"], ["tenants", "add"]):
        with pytest.raises(SystemExit):
            main([*verb, "--help"])
        text = capsys.readouterr().out
        assert [name for name in QUOTAS if f"--quota_{name}" not in text] == []
