"""The audit log: what was changed shows, and a crash takes no event that was told."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.main import main
from cutlayer.errors import StorageError, Tampered
from cutlayer.server import audit_log
from cutlayer.server.audit_log import AuditLog, verify

EVENTS = 12


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of twelve events."""
    path = tmp_path / "audit.jsonl"
    written = AuditLog(path)
    for number in range(EVENTS):
        written.write("saved", tenant="ward-a", run="r", step=number, size_bytes=100 + number)
    written.close()
    return path


def changed(log: Path, how: Any) -> Path:
    """Write the log's lines anew as a hand would that changes them."""
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(how(lines)))
    return log


def with_words(lines: list[str], number: int, old: str, new: str) -> list[str]:
    """Return the lines with a word of one of them replaced."""
    assert old in lines[number]
    return [*lines[:number], lines[number].replace(old, new), *lines[number + 1 :]]


def forged(lines: list[str], number: int) -> list[str]:
    """Return the lines with one changed whose own hash was made to fit."""
    line = json.loads(lines[number]) | {"tenant": "ward-b"}
    line["hash"] = audit_log._hash_of(line)
    return [*lines[:number], audit_log._canonical(line) + "\n", *lines[number + 1 :]]


HANDS = {
    "a changed line with a hash that fits": lambda lines: forged(lines, 5),
    "a changed number": lambda lines: with_words(lines, 4, '"step":4', '"step":5'),
    "a changed tenant in the last line": lambda lines: with_words(lines, 11, "ward-a", "ward-b"),
    "a changed time": lambda lines: with_words(lines, 0, '"time":"2', '"time":"1'),
    "a missing first line": lambda lines: lines[1:],
    "a missing line": lambda lines: lines[:5] + lines[6:],
    "two lines moved": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "a line twice": lambda lines: [*lines[:5], lines[4], *lines[5:]],
    "a line put in": lambda lines: [*lines[:5], lines[4].replace('"n":5', '"n":6'), *lines[5:]],
    "spaces": lambda lines: with_words(lines, 7, '"n":8', '"n": 8'),
    "a line that is none": lambda lines: [*lines[:5], "nothing\n", *lines[6:]],
    "a line without a hash": lambda lines: [*lines[:5], '{"n":6}\n', *lines[6:]],
    "an empty line": lambda lines: [*lines[:5], "\n", *lines[5:]],
    "a torn last line": lambda lines: [*lines[:-1], lines[-1][:-20]],
}


@pytest.mark.parametrize("hand", HANDS)
def test_a_hand_in_the_log_is_found(hand: str, log: Path, capsys: pytest.CaptureFixture[str]):
    """A changed, missing, moved, doubled or torn line is named; the untouched log holds."""
    assert main(["audit-log", "verify", str(log)]) == 0
    assert f"{EVENTS} lines" in capsys.readouterr().out

    changed(log, HANDS[hand])

    assert main(["audit-log", "verify", str(log)]) == 8
    assert f"{log} line " in capsys.readouterr().err


def test_lines_cut_off_at_the_end_show_against_a_noted_head(log: Path):
    """Without its last lines the log holds by itself, and not with a head noted before."""
    head = verify(log).hash
    earlier = json.loads(log.read_text().splitlines()[5])["hash"]

    assert verify(log, earlier).hash == head
    changed(log, lambda lines: lines[:-2])
    assert verify(log).lines == EVENTS - 2
    with pytest.raises(Tampered, match="cut off"):
        verify(log, head)


def test_a_whole_log_written_anew_shows_against_a_noted_head(log: Path):
    """Who writes all of the log anew, hashes and all, does not get the noted head."""
    head = verify(log).hash
    log.unlink()
    forged = AuditLog(log)
    for number in range(EVENTS):
        forged.write("saved", tenant="ward-a", run="r", step=number, size_bytes=1)

    assert verify(log).lines == EVENTS
    with pytest.raises(Tampered, match="written anew"):
        verify(log, head)


def test_a_torn_last_line_is_repaired_and_noted(log: Path):
    """Wherever a crash cut the last line, the log goes on from the line before, and says so."""
    whole = log.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for kept in (1, 2, last // 2, last - 1):
        log.write_bytes(whole[: len(whole) - last + kept])

        AuditLog(log).close()

        found = [json.loads(line) for line in log.read_text().splitlines()]
        assert verify(log).lines == EVENTS
        assert (found[-1]["event"], found[-1]["torn_bytes"]) == ("repaired", kept)


def test_nothing_is_appended_to_a_log_whose_end_was_changed(log: Path):
    """A server refuses to go on in a log whose last line does not hold, and leaves it as it is."""
    changed(log, HANDS["a changed tenant in the last line"])
    before = log.read_bytes()

    with pytest.raises(Tampered, match="keep it as evidence"):
        AuditLog(log)
    assert log.read_bytes() == before


def test_a_log_that_was_moved_away_is_continued_in_a_new_one(log: Path):
    """After a rotation the new file's first line names the end of the old one."""
    written = AuditLog(log)
    log.rename(log.with_suffix(".old"))

    written.write("closed", tenant="ward-a")

    first = json.loads(log.read_text().splitlines()[0])
    old = verify(log.with_suffix(".old"))
    assert (first["event"], first["after_lines"], first["after_hash"]) == (
        "continues",
        EVENTS,
        old.hash,
    )
    assert verify(log).lines == 2


def test_a_full_disk_leaves_the_log_as_it_was(log: Path, monkeypatch: pytest.MonkeyPatch):
    """An event that cannot be synced is StorageError, and is not half in the log afterwards."""
    written, before = AuditLog(log), log.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(audit_log.os, "fsync", full)
    with pytest.raises(StorageError, match="free space"):
        written.write("opened", tenant="ward-a")
    monkeypatch.undo()

    assert log.read_bytes() == before
    written.write("opened", tenant="ward-a")
    assert verify(log).lines == EVENTS + 1


WRITER = """
import sys
from pathlib import Path
from cutlayer.server.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]))
for number in range(100_000):
    log.write("opened", tenant=sys.argv[2], step=number)
    print(number, flush=True)
"""


def test_writers_that_are_killed_lose_no_event_that_was_told(tmp_path: Path):
    """Two processes write one log and are killed at random moments: the chain holds all events."""
    path, moments = tmp_path / "audit.jsonl", random.Random(7)
    told: dict[str, int] = {}
    for round_ in range(3):
        names = [f"{round_}-{i}" for i in range(2)]
        outputs = {name: tmp_path / f"{name}.out" for name in names}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(path), name], stdout=outputs[name].open("wb")
            )
            for name in names
        ]
        while not all(outputs[name].stat().st_size > 20 for name in names):
            time.sleep(0.02)
        for process in started:
            time.sleep(moments.random() / 10)
            process.send_signal(signal.SIGKILL)
            process.wait()
        told |= {name: len(outputs[name].read_text().splitlines()) for name in names}
    AuditLog(path).close()

    verify(path)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for name, count in told.items():
        steps = [event["step"] for event in events if event.get("tenant") == name]
        assert steps == list(range(len(steps)))
        assert len(steps) >= count > 0
