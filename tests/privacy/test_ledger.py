"""What was released is on the disk before it leaves, whatever happens."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cutlayer.errors import BudgetExhausted, ConfigError, DataError, StorageError
from cutlayer.privacy.accountant import sigma_for
from cutlayer.privacy.guarantee import guarantee
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.release import Release

DELTA = 1e-5


def release(*records: str, planned: int = 10, epsilon: float = 8, **changed: object) -> Release:
    """Return a release of which `planned` fit into epsilon."""
    sigma = sigma_for(epsilon, DELTA, planned)
    facts = {"mechanism": "ldp_sequence", "channel": "activations", "unit": "u", "clip": 1.0}
    noise = {"sigma": sigma, "noise_multiplier": sigma / 2, "records": records}
    return Release(**{**facts, **noise, **changed})


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Ledger]:
    """Return a function that opens the ledger of this test."""
    made: list[Ledger] = []

    def open_ledger(epsilon: float | None = 8, **settings: object) -> Ledger:
        for ledger in made:
            ledger.close()
        made.append(
            Ledger(tmp_path / "ledger.jsonl", epsilon=epsilon, **{"delta": DELTA, **settings})
        )
        return made[-1]

    yield open_ledger
    for ledger in made:
        ledger.close()


def booked(path: Path) -> list[dict]:
    """Return the lines of releases."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "release"]


# ---------------------------------------------------------------------- the budget


def test_planned_releases_fit_and_the_next_is_refused(opened: Callable[..., Ledger]):
    """Ten releases were planned: ten are booked, and the eleventh is not, in one sentence."""
    ledger = opened()
    for number in range(10):
        assert ledger.remaining(release("a"), "a") == 10 - number
        assert ledger.book(release("a"), f"digest {number}")

    with pytest.raises(
        BudgetExhausted, match=r"bring epsilon to 8\.\d+ at .* budget is 8:"
    ) as told:
        ledger.book(release("a"), "digest 10")

    assert "nothing was sent" in str(told.value)
    assert "8.00 at" not in str(told.value)
    assert guarantee(ledger.releases_of("a"), delta=DELTA)["epsilon"] == pytest.approx(8, abs=1e-4)


def test_each_record_has_its_own_budget(opened: Callable[..., Ledger]):
    """What one record spent takes nothing from another; a batch is booked whole or not at all."""
    ledger = opened()
    for number in range(10):
        ledger.book(release("a"), f"{number}")

    with pytest.raises(BudgetExhausted):
        ledger.book([release("b"), release("a")], "both")

    assert ledger.releases_of("b") == []
    assert ledger.remaining(release("b"), "b") == 10
    assert ledger.remaining(release("b")) == 0  # of the record that spent most


def test_a_release_without_records_counts_for_all(opened: Callable[..., Ledger]):
    """Where it is not known whom a tensor touches, everybody pays."""
    ledger = opened()
    ledger.book(release("a"), "1")
    for number in range(9):
        ledger.book(release(), f"all {number}")

    with pytest.raises(BudgetExhausted):
        ledger.book(release("a"), "2")
    ledger.book(release("b"), "3")
    with pytest.raises(BudgetExhausted):
        ledger.book(release(), "4")


def test_one_message_is_summed_before_it_is_judged(opened: Callable[..., Ledger]):
    """Parts that would fit one by one do not if the message that has all of them does not."""
    ledger = opened()
    for number in range(9):
        ledger.book(release("a"), f"{number}")

    for message in ([release(), release("a")], [release("a"), release("a")], [release("a", "a")]):
        with pytest.raises(BudgetExhausted):
            ledger.book(message, "both")
    assert ledger.remaining(release("a"), "a") == 1


def test_a_record_twice_in_one_sum_pays_four_times(opened: Callable[..., Ledger]):
    """A sequence that is twice in a batch moves the batch's sum twice as far."""
    ledger = opened()
    ledger.book(release("a", "a", "b"), "sum")

    assert ledger.remaining(release("a"), "a") == 6
    assert ledger.remaining(release("b"), "b") == 9


def test_channels_share_one_budget(opened: Callable[..., Ledger]):
    """Activations and gradients of one record are spent from the same epsilon."""
    ledger = opened()
    for number in range(5):
        ledger.book(release("a"), f"up {number}")
        ledger.book(release("a", mechanism="noisy_grad", channel="gradients"), f"down {number}")

    with pytest.raises(BudgetExhausted):
        ledger.book(release("a"), "one more")


def test_raising_the_budget_is_a_recorded_decision(opened: Callable[..., Ledger], tmp_path: Path):
    """A run goes on with more epsilon only if a person is named, and the file says who."""
    ledger = opened()
    for number in range(10):
        ledger.book(release("a"), f"{number}")

    with pytest.raises(ConfigError, match="name who decided"):
        ledger.raise_budget(12, " ")
    with pytest.raises(ConfigError, match="no raise"):
        ledger.raise_budget(8, "A. Keller")
    with pytest.raises(ConfigError, match="have a person raise"):
        opened(12)
    opened(12, raised_by="A. Keller").book(release("a"), "10")

    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    (decision,) = [line for line in lines if line["kind"] == "raise"]
    assert (decision["epsilon"], decision["by"]) == (12, "A. Keller")
    assert opened(12).remaining(release("a"), "a") > 0
    with pytest.raises(ConfigError, match="not the ledger's"):
        opened(12, delta=1e-6)


def test_no_accountant_runs_while_booking(
    opened: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
):
    """Once a ledger has booked, booking costs a line and no calculation of epsilon."""
    ledger, one = opened(), release("a", planned=1000)
    ledger.book(one, "first")
    monkeypatch.setattr("cutlayer.privacy.accountant._dp", None)

    for number in range(50):
        ledger.book(one, f"{number}")


def test_a_mechanism_without_an_epsilon_is_refused_where_there_is_a_budget(
    opened: Callable[..., Ledger],
):
    """A budget cannot be kept with noise that has no epsilon; without one it is only counted."""
    informal = release("a", mechanism="gaussian", formal=False)

    with pytest.raises(ConfigError, match="'gaussian' has no epsilon"):
        opened().book(informal, "digest")


def test_without_a_budget_everything_is_counted(tmp_path: Path):
    """A ledger without epsilon refuses nothing and knows how often each record left."""
    with Ledger(tmp_path / "other.jsonl", epsilon=None, delta=None) as ledger:
        for number in range(30):
            ledger.book(release("a", mechanism="gaussian", formal=False), f"{number}")

        assert len(ledger.releases_of()) == 30
        assert ledger.remaining(release("a")) is None


# ---------------------------------------------------------------------- retries


def test_a_byte_identical_retry_is_booked_once(opened: Callable[..., Ledger], tmp_path: Path):
    """The same bytes under the same key tell nothing new, now or after a restart; others do."""
    batch = [release("a"), release("b"), release("a")]

    assert opened().book(batch, "bytes", "run/7")
    assert not opened().book(batch, "bytes", "run/7")
    assert opened().book(batch, "other bytes", "run/7")
    assert opened().book(batch, "bytes", "run/8")
    assert opened().book(batch, "bytes")
    assert opened().book(batch, "bytes")

    assert len(booked(tmp_path / "ledger.jsonl")) == 5 * 3
    assert len(opened().releases_of("a")) == 10


# ---------------------------------------------------------------------- crashes

BOOKING = """
import os
import sys
from pathlib import Path
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.release import Release

one = Release("gaussian", "activations", "none", 0.0, 1.0, 0.0, ("r",), formal=False)
with Ledger(Path(sys.argv[1]), epsilon=None, delta=None) as ledger:
    for number in range(10**9):
        request = f"{os.getpid()}/{number}"
        ledger.book([one, one], f"digest {number}", request)
        sys.stdout.write(f"{request}\\n")  # the tensor would leave here
        sys.stdout.flush()
"""


def test_nothing_that_left_is_lost_when_the_process_is_killed(tmp_path: Path):
    """After kill -9 in a loop of bookings, each one that returned is there, and booking goes on."""
    path, left = tmp_path / "ledger.jsonl", set()
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", BOOKING, str(path)], stdout=subprocess.PIPE, text=True
        ) as process:
            left.add(process.stdout.readline().strip())
            time.sleep(random.uniform(0.0, 0.2))
            os.kill(process.pid, signal.SIGKILL)
            left |= {line.strip() for line in process.stdout if line.endswith("\n")}

        with Ledger(path, epsilon=None, delta=None) as ledger:
            counted = len(ledger.releases_of("r"))
        parts = collections.Counter(line["request"] for line in booked(path))
        assert {request for request, count in parts.items() if count == 2} >= left
        # At most the booking that was under way when the process died had not left.
        assert 2 * len(left) <= counted == parts.total()

    assert len(left) > 3


def test_what_is_booked_is_on_the_disk_when_book_returns(
    opened: Callable[..., Ledger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A power failure after `book` finds every line: each is synced, and once a message."""
    synced: list[bytes] = []
    sync = os.fsync

    def watched(file: int) -> None:
        sync(file)
        synced.append((tmp_path / "ledger.jsonl").read_bytes())

    ledger = opened()
    monkeypatch.setattr(os, "fsync", watched)
    for number in range(3):
        ledger.book([release("a"), release("b")], f"{number}")
        assert synced[-1] == (tmp_path / "ledger.jsonl").read_bytes()
        assert len(synced) == number + 1


@pytest.mark.parametrize("torn", [1, 40, 300])
def test_a_torn_last_line_is_dropped(opened: Callable[..., Ledger], tmp_path: Path, torn: int):
    """A line that was half written when the power failed is taken away, and booking goes on."""
    path = tmp_path / "ledger.jsonl"
    opened().book(release("a"), "one")
    whole = path.read_bytes()
    opened().book(release("a"), "two")
    path.write_bytes(path.read_bytes()[: len(whole) + torn])

    ledger = opened()

    assert path.read_bytes() == whole
    assert ledger.remaining(release("a"), "a") == 9
    ledger.book(release("a"), "three")
    assert opened().remaining(release("a"), "a") == 8


def test_what_could_not_be_written_does_not_leave(tmp_path: Path):
    """With the disk full nothing is booked and nothing may be sent, even once there is space."""
    # A limit on the file's size is what an ordinary user can have of a full disk.
    code = BOOKING.replace("import sys", "import resource, signal, sys").replace(
        "with Ledger",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\nwith Ledger",
    )
    path = tmp_path / "ledger.jsonl"

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )

    assert "StorageError" in done.stderr
    assert "so nothing was sent: free space" in done.stderr
    assert len(booked(path)) == 2 * len(done.stdout.splitlines()) > 0
    with Ledger(path, epsilon=None, delta=None) as ledger:
        assert ledger.book(release("r", formal=False), "again")


# ---------------------------------------------------------------------- hands off


@pytest.mark.parametrize("change", ["digest", "removed", "swapped", "sigma", "head", "garbage"])
def test_an_altered_ledger_is_refused(opened: Callable[..., Ledger], tmp_path: Path, change: str):
    """A line changed, taken out, moved or put in is seen."""
    path = tmp_path / "ledger.jsonl"
    ledger = opened()
    for number in range(4):
        ledger.book(release("a"), f"digest {number}")
    lines = path.read_text().splitlines()
    if change == "digest":
        lines[-1] = lines[-1].replace("digest 3", "digest 9")
    elif change == "removed":
        del lines[2]
    elif change == "swapped":
        lines[2], lines[3] = lines[3], lines[2]
    elif change == "sigma":
        lines[2] = lines[2].replace('"sigma": ', '"sigma": 1')
    elif change == "head":
        lines[0] = lines[0].replace('"epsilon": 8', '"epsilon": 9')
    else:
        lines[2] = "{}"
    path.write_text("\n".join(lines) + "\n")

    with pytest.raises(DataError, match="altered or damaged at line"):
        opened(9 if change == "head" else 8)


def test_two_processes_do_not_share_a_ledger(opened: Callable[..., Ledger], tmp_path: Path):
    """A second run on the same data is refused while the first has the ledger open."""
    opened()

    with pytest.raises(StorageError, match="in use by another process"):
        Ledger(tmp_path / "ledger.jsonl", epsilon=8, delta=DELTA)


def test_records_have_ids_that_only_this_ledger_can_make(tmp_path: Path):
    """The same text has one id in a ledger, another one in the next, and the file is private."""
    with Ledger(tmp_path / "a.jsonl", epsilon=8, delta=DELTA) as one:
        first = one.record_of([5, 7, 9])
        assert first == one.record_of((5, 7, 9)) != one.record_of([57, 9])
    with Ledger(tmp_path / "a.jsonl", epsilon=8, delta=DELTA) as again:
        assert again.record_of([5, 7, 9]) == first
    with Ledger(tmp_path / "b.jsonl", epsilon=8, delta=DELTA) as other:
        assert other.record_of([5, 7, 9]) != first
    assert (tmp_path / "a.jsonl").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epsilon": -1.0, "delta": DELTA}, "the ledger: epsilon = -1.0"),
        ({"epsilon": 8, "delta": 1e-3, "records": 1000}, "below 1/n"),
        ({"epsilon": 8, "delta": None}, "no delta"),
    ],
)
def test_a_budget_that_makes_no_sense(tmp_path: Path, settings: dict, says: str):
    """A wrong budget is refused before a file is made."""
    with pytest.raises(ConfigError, match=says):
        Ledger(tmp_path / "ledger.jsonl", **settings)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    """Without a place for the ledger nothing is sent."""
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="cannot be opened"):
        Ledger(tmp_path / "file" / "ledger.jsonl", epsilon=8, delta=DELTA)
