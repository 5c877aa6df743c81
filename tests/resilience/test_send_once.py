"""Rows that the server has lost, for whatever reason, are sent again, and the run is the same."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.proxy import Proxy
from cutlayer.cli.main import main
from cutlayer.client.savepoints import newest_checkpoint
from cutlayer.errors import StorageError
from cutlayer.server.access import Limits
from cutlayer.server.quotas import Quotas
from cutlayer.wire import cutlayer_pb2 as pb
from tests.cli.test_by_hand import saved_tiny, write_rows, write_run
from tests.equivalence.test_send_once import FROZEN
from tests.resilience.test_savepoints import checkpoints, started, until
from tests.site import Loop, ServerProcess, Site, adapter_of, batch_of, equal, site_of
from tests.tokens import dataset

EPOCHS, BATCHES = 3, 3
TTL_S = 1000.0


def trained(
    site: Site, *, disturb: Callable[[Any, int], None] | None = None, **settings: Any
) -> tuple[list[Any], Any]:
    """Train epochs over the same batches; return all that was seen, and the rows' counts."""
    seen: list[Any] = []
    asked = {"train": FROZEN, "seed": 3, "lease_s": 60.0, **settings}
    with site.connect(**asked) as split:
        loop = Loop.over(split)
        for step in range(EPOCHS * BATCHES):
            if disturb:
                disturb(split, step)
            seen += loop.step(batch_of(step % BATCHES), batch_of(10 + step % BATCHES))
        seen.append(adapter_of(split))
        counts = split.by_rows.once.counts() if split.by_rows else {}
        return seen, {**counts, "resent": split.connection.traffic.resent}


@pytest.fixture
def keeping(llama: Site, certs: Path, tmp_path: Path) -> Iterator[Site]:
    """A server that keeps rows, with a folder of its own."""
    site = site_of(llama.folder, certs, tmp_path / "state", row_ttl_s=TTL_S)
    yield site
    site.server.stop(grace_s=0.5)


def rows_in(state: Path) -> list[Path]:
    """Return the files of all kept rows."""
    return [path for path in state.glob("*/*/rows/*/*/*") if path.is_file()]


def settled(state: Path, number: int) -> None:
    """Wait until so many rows are on the disk."""
    until(lambda: len(rows_in(state)) == number, within_s=10)


ROWS = 2 * BATCHES * 4


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("which", ["all", "some", "torn"])
def test_rows_that_are_gone_are_sent_again(
    llama: Site, keeping: Site, tmp_path: Path, which: str, chunks: int
):
    """Deleted or damaged at the server between two steps, they come again within the step."""

    def disturb(_split: Any, step: int) -> None:
        if step != BATCHES + 1:
            return
        settled(tmp_path / "state", ROWS)
        for number, path in enumerate(sorted(rows_in(tmp_path / "state"))):
            if which == "torn":
                path.write_bytes(path.read_bytes()[:-7])
            elif which == "all" or number % 3 == 0:
                path.unlink()

    found, counts = trained(keeping, send_once=True, chunks=chunks, disturb=disturb)

    assert equal(trained(llama, chunks=chunks)[0], found)
    assert ROWS < counts["sent"] <= 2 * ROWS
    assert counts["sent"] + counts["named"] >= EPOCHS * ROWS


def test_rows_of_a_killed_server_are_named_to_its_heir(llama: Site, certs: Path, tmp_path: Path):
    """SIGKILL in a later epoch: the key comes with the new stream, and what is left is used."""
    flags = {"send_once_ttl_s": TTL_S}
    servers = [ServerProcess(llama.folder, certs, tmp_path / "state", **flags)]
    port = servers[0].port

    def disturb(_split: Any, step: int) -> None:
        if step == 2 * BATCHES:
            settled(tmp_path / "state", ROWS)
            servers[-1].kill()
            for path in rows_in(tmp_path / "state")[:5]:
                path.unlink()
            state = tmp_path / "state"
            servers.append(ServerProcess(llama.folder, certs, state, port=port, **flags))

    found, counts = trained(Site(llama.folder, certs, servers[0]), send_once=True, disturb=disturb)
    servers[-1].kill()
    with ServerProcess(llama.folder, certs, tmp_path / "calm") as server:
        expected, _ = trained(Site(llama.folder, certs, server))

    assert equal(expected, found)
    # No mark was written so soon: all was asked again, and what came first brought its rows again.
    assert counts["resent"] > 2 * BATCHES
    assert counts["sent"] == ROWS


def test_requests_that_are_asked_again_find_no_rows(
    llama: Site, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A server killed in epoch three whose rows are all gone is made again from their copies.

    What the codec has learnt comes from the mark: the copies are read with it.
    """
    monkeypatch.setattr("cutlayer.client.calibration._TOKENS_FOR_A_MEAN", 60)
    lossy = {"codec": "rotated4"}
    flags = {"send_once_ttl_s": TTL_S}
    servers = [ServerProcess(llama.folder, certs, tmp_path / "state", **flags)]
    port = servers[0].port

    def disturb(split: Any, step: int) -> None:
        if step == BATCHES:  # from here on the log of what is asked again names rows only
            connection = split.connection
            connection.request(pb.Head(mark=pb.Mark()), unattended=True)
            deadline = time.monotonic() + 20
            while connection._log.trimmed_to == 0 and time.monotonic() < deadline:
                with torch.no_grad():
                    split(**batch_of(0))
        if step == 2 * BATCHES + 1:
            servers[-1].kill()
            for home in (tmp_path / "state").glob("*/*/rows"):
                shutil.rmtree(home)
            state = tmp_path / "state"
            servers.append(ServerProcess(llama.folder, certs, state, port=port, **flags))

    site = Site(llama.folder, certs, servers[0])
    found, counts = trained(site, send_once=True, disturb=disturb, **lossy)
    servers[-1].kill()
    with ServerProcess(llama.folder, certs, tmp_path / "calm") as server:
        expected, _ = trained(Site(llama.folder, certs, server), **lossy)

    assert equal(expected, found)
    first = 8  # those of the first step, before there were statics
    assert counts["sent"] == 2 * ROWS + first


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_link_that_is_cut_loses_no_row(llama: Site, keeping: Site, chunks: int):
    """Streams that begin anew bring the key anew; nothing is sent twice to be kept."""
    proxy = Proxy(keeping.server.port)
    address = f"127.0.0.1:{proxy.port}"

    def disturb(_split: Any, step: int) -> None:
        if step > 1:
            proxy.cut()

    found, counts = trained(keeping, send_once=True, server=address, chunks=chunks, disturb=disturb)
    proxy.close()

    assert equal(trained(llama, chunks=chunks)[0], found)
    assert counts["sent"] == ROWS


def test_a_parked_session_forgets_the_key_and_gets_it_again(
    llama: Site, certs: Path, tmp_path: Path
):
    """Between two calls a parked run's rows cannot be read by anybody at the server."""
    limits = Limits(lease_s=0.4)
    site = site_of(llama.folder, certs, tmp_path, row_ttl_s=TTL_S, limits=limits)
    sessions: Any = site.server.sessions

    def fall_silent(_split: Any, step: int) -> None:
        if step == BATCHES:
            until(lambda: not sessions._open, within_s=10)

    found, counts = trained(site, send_once=True, disturb=fall_silent)
    site.server.stop(0.5)

    assert equal(trained(llama)[0], found)
    assert counts["sent"] == ROWS


def test_what_is_over_the_quota_is_not_kept(llama: Site, certs: Path, tmp_path: Path):
    """A row without room comes up again in each epoch, without an error and without the bottom."""
    room = 10 * 2600  # ten rows of this model
    quotas = Quotas(row_bytes=room)
    site = site_of(llama.folder, certs, tmp_path, row_ttl_s=TTL_S, quotas=quotas)
    sizes: list[int] = []
    numbers: list[int] = []

    def disturb(_split: Any, step: int) -> None:
        rows = rows_in(tmp_path)
        numbers.append(len(rows))
        sizes.append(sum(path.stat().st_size for path in rows))

    found, counts = trained(site, send_once=True, disturb=disturb)
    site.server.stop(0.5)

    assert equal(trained(llama)[0], found)
    assert 0 < max(sizes) <= room + 12 * 28  # each sealed record has 28 bytes more
    assert counts["sent"] == ROWS + (EPOCHS - 1) * (ROWS - max(numbers))
    assert counts["resent"] == 0


def test_a_disk_that_is_full_costs_bytes_and_not_the_run(
    llama: Site, keeping: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rows that cannot be written are told of, and come again."""

    def full(_self: Path, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    def disturb(_split: Any, step: int) -> None:
        if step == 0:
            write = Path.write_bytes
            monkeypatch.setattr(
                Path,
                "write_bytes",
                lambda path, data: full(path, data) if "state" in str(path) else write(path, data),
            )

    found, counts = trained(keeping, send_once=True, disturb=disturb)

    assert equal(trained(llama)[0], found)
    assert rows_in(tmp_path / "state") == []
    assert counts["sent"] > 2 * ROWS


def test_old_rows_go_and_come_again(llama: Site, keeping: Site, tmp_path: Path):
    """A row that is older than its time is not used, and is deleted."""

    def disturb(_split: Any, step: int) -> None:
        if step == BATCHES:
            settled(tmp_path / "state", ROWS)
            long_ago = time.time() - TTL_S - 1
            for path in rows_in(tmp_path / "state")[:7]:
                os.utime(path, (long_ago, long_ago))
        if step == BATCHES + 1:
            store: Any = keeping.server.sessions._rows
            store._next_sweep_s = 0.0
            store.sweep_if_due()

    found, counts = trained(keeping, send_once=True, disturb=disturb)

    assert equal(trained(llama)[0], found)
    assert counts["sent"] == ROWS + 7


def test_a_copy_that_was_damaged_here_is_told_of(keeping: Site, tmp_path: Path):
    """Without it the row cannot be sent again: one sentence, and the next run sends it anew."""
    folder = tmp_path / "once"
    settings = {"train": FROZEN, "send_once": folder, "run": "one"}
    split = keeping.connect(**settings)
    with torch.no_grad():
        split(**batch_of(1), use_cache=False)
        settled(tmp_path / "state", 4)
        for home in (tmp_path / "state").glob("*/*/rows"):
            shutil.rmtree(home)
        copies = sorted(folder.glob("rows/*/*"))
        copies[0].write_bytes(b"x" * 100)
        with pytest.raises(StorageError, match="--resume"):
            split(**batch_of(1), use_cache=False)
        split.close(keep_rows=True)
        with keeping.connect(**settings) as again:
            again(**batch_of(1), use_cache=False)
            counts = again.by_rows.once.counts()

    assert counts["sent"] == 4


def test_a_resumed_run_finds_its_rows(folder_of: Any, certs: Path, tmp_path: Path):
    """Ctrl-C and `--resume`: what went up before goes up no more; at the end all copies go."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    write_rows(tmp_path, [{"text": text} for text in dataset(24)["text"]])
    common = {
        "split_ca": str(certs / "ca.pem"),
        "split_cert": None,
        "split_key": None,
        "split_send_once": True,
        "split_train": ["trunk", "top"],
        "split_chunks": 2,
        "pad_to_multiple_of": 64,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 400,
        "lr_scheduler_type": "constant",
    }
    flags = {"send_once_ttl_s": TTL_S}
    with ServerProcess(model, certs, tmp_path / "state", **flags) as server:
        config = write_run(tmp_path, model, server.port, **common)
        first = started(config, tmp_path)
        until(lambda: len(checkpoints(tmp_path / "out")) > 1)
        first.kill()
        first.wait()
        copies = len(list((tmp_path / "out" / "send_once" / "rows").glob("*/*")))
        mode = (tmp_path / "out" / "send_once" / "key").stat().st_mode & 0o777
        kept = len(rows_in(tmp_path / "state"))
        last = newest_checkpoint(tmp_path / "out")
        assert last is not None
        total = int(last.name.rpartition("-")[2]) + 3
        finish = write_run(tmp_path, model, server.port, **common | {"max_steps": total})
        command = ["train", "--config", str(finish), "--resume", "--threads", "1"]
        assert main(command) == 0
        left = rows_in(tmp_path / "state")

    assert mode == 0o600
    assert kept >= 4
    assert copies >= kept
    assert left == []
    assert not (tmp_path / "out" / "send_once").exists()
