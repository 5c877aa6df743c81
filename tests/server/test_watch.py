"""What the server tells of a run: in the audit log, and nothing of its contents."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.main import main
from cutlayer.errors import Refused, StorageError, Unauthorized
from cutlayer.server.audit_log import AuditLog, verify
from cutlayer.server.metrics import Metrics
from cutlayer.server.watch import Watch
from tests.site import Loop, batch_of, site_of


def events_of(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log whose chain holds."""
    verify(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_its_events_with_sizes(folder_of: Any, certs: Path, tmp_path: Path):
    """Added, opened, saved, exported, closed, refused, revoked: each is there, with its size."""
    log = tmp_path / "audit.jsonl"
    site = site_of(folder_of("llama"), certs, tmp_path, auth="token", watch=Watch(AuditLog(log)))
    token = site.server.gate.register.add("ward-a")
    with pytest.raises(Unauthorized):
        site.connect(token="cutlayer_made-up", run="mine")
    model = site.connect(token=token, run="mine")
    Loop.over(model).step(batch_of(1))
    model.connection.request(_save_state(1)).wait()
    adapter = model.whole_adapter()
    model.close()
    assert main(["tenants", "revoke", "ward-a", "--state_dir", str(tmp_path)]) == 0
    site.server.stop(grace_s=0.2)

    events = {event["event"]: event for event in events_of(log)}
    trunk = sum(t.nbytes for name, t in adapter.items() if 2 <= _layer(name) <= 4)
    assert {"refused", "opened", "saved", "exported", "closed", "tenant revoked"} <= events.keys()
    assert events["opened"]["parameters"] * 4 == events["exported"]["size_bytes"] == trunk
    assert events["saved"]["size_bytes"] > 3 * trunk
    assert events["saved"]["step"] == events["closed"]["step"] == 1
    assert (events["closed"]["steps"], events["closed"]["tokens"]) == (1, 44)
    assert events["closed"]["received_bytes"] > 44 * 4
    assert (events["refused"]["code"], events["refused"]["tenant"]) == ("unauthorized", "")
    assert "127.0.0.1" in events["refused"]["peer"]
    assert "made-up" not in log.read_text()
    assert token not in log.read_text()


def _layer(name: str) -> int:
    return next(int(word) for word in name.split(".") if word.isdigit())


def _save_state(step: int) -> Any:
    from cutlayer.wire import cutlayer_pb2 as pb

    return pb.Head(save_state=pb.SaveState(step=step))


def test_nobody_comes_in_unlogged(
    folder_of: Any, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While the audit log cannot be written, no session is opened."""
    audit = AuditLog(tmp_path / "audit.jsonl")
    site = site_of(folder_of("llama"), certs, tmp_path, watch=Watch(audit))

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cutlayer.server.audit_log.os.fsync", full)
    with pytest.raises(StorageError, match="audit log"):
        site.connect()
    monkeypatch.undo()

    site.connect().close()
    site.server.stop(grace_s=0.2)


def test_a_flood_of_refusals_is_told_by_its_number(tmp_path: Path):
    """A thousand refusals of one kind within a minute are few lines; another tenant's is told."""
    watch = Watch(AuditLog(tmp_path / "audit.jsonl"))
    for _ in range(1000):
        watch.refused("", Unauthorized("no token"), peer="ipv4:1.2.3.4:5")
    watch.refused("ward-a", Refused("no place"))

    events = events_of(tmp_path / "audit.jsonl")
    assert len(events) <= 2 * 30 + 1
    assert events[-1]["tenant"] == "ward-a"


def test_what_is_counted_does_not_grow_with_the_requests():
    """Nobody may ask for a rate for weeks; thousands of requests leave nothing behind."""
    metrics = Metrics()

    def answered(times: int) -> int:
        for _ in range(times):
            metrics.answered(
                "ward",
                phase="forward",
                tokens=64,
                received_bytes=1,
                sent_bytes=1,
                queued_s=0.1,
                computed_s=0.1,
            )
        gc.collect()
        mine = tracemalloc.Filter(True, Metrics.__init__.__code__.co_filename)
        found = tracemalloc.take_snapshot().filter_traces([mine]).traces
        return sum(trace.size for trace in found)

    tracemalloc.start()
    before_bytes = answered(10)
    grown_bytes = answered(2000) - before_bytes
    tracemalloc.stop()

    assert grown_bytes < 20_000
    assert metrics.tokens_per_s("ward") == pytest.approx(2010 * 64 / 60)
