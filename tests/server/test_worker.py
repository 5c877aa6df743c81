"""The trunk's time is shared evenly, and what was begun is finished first."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from cutlayer.server.worker import Joint, TrunkThread

QUANTUM_S = 0.05


class Books:
    """Who has how many graphs, in which order things were done, and for how long."""

    def __init__(self) -> None:
        self.graphs: dict[str, int] = {}
        self.done: list[tuple[str, str]] = []
        self.seconds: dict[str, float] = {}
        self.most_holders = 0

    def holders(self) -> set[str]:
        """Return the tenants that have graphs."""
        return {tenant for tenant, graphs in self.graphs.items() if graphs}

    def work(self, tenant: str, what: str, seconds: float) -> Callable[[], None]:
        """Return a piece of work that takes so long."""

        def do() -> None:
            change = {"forward": 1, "backward": -1}.get(what, 0)
            self.graphs[tenant] = self.graphs.get(tenant, 0) + change
            self.most_holders = max(self.most_holders, len(self.holders()))
            self.done.append((tenant, what))
            started_s = time.monotonic()
            time.sleep(seconds)
            took_s = time.monotonic() - started_s
            self.seconds[tenant] = self.seconds.get(tenant, 0.0) + took_s

        return do


@pytest.fixture
def books() -> Books:
    """Nothing done yet."""
    return Books()


@pytest.fixture
def thread(books: Books) -> Iterator[TrunkThread]:
    """A trunk thread that is given work by one hand."""
    made = TrunkThread(books.holders, quantum_s=QUANTUM_S)
    yield made
    made.stop()


def hand_in(
    thread: TrunkThread, books: Books, tenant: str, *whats: str, seconds: float = 0.002
) -> None:
    """Hand in what one tenant asks, in its order."""
    for what in whats:
        do = books.work(tenant, what, seconds)
        ends = what in ("backward", "step")
        thread.submit(do, tenant, begins=what == "forward", ends=ends)


def together(thread: TrunkThread, hand_all_in: Callable[[], None]) -> None:
    """Have all of it wait before the first is done; return when all is done."""
    gate = threading.Event()
    thread.submit(gate.wait, "gate")
    hand_all_in()
    gate.set()
    while thread.depth():
        time.sleep(0.01)
    thread.stop()


def test_a_step_is_finished_before_another_tenants_begins(thread: TrunkThread, books: Books):
    """With graphs that all fit into a quantum, no two tenants have graphs at once."""
    step = ("forward", "forward", "backward", "backward", "step")

    def hand_all_in() -> None:
        for tenant in "abcd":
            hand_in(thread, books, tenant, *step * 3)

    together(thread, hand_all_in)

    assert books.most_holders == 1
    assert len(books.done) == 4 * 3 * len(step)
    order = [tenant for tenant, what in books.done if what == "step"]
    assert all(set(order[i : i + 4]) == set("abcd") for i in (0, 4, 8))


def test_who_needs_no_graph_does_not_wait_for_graphs(thread: TrunkThread, books: Books):
    """A generation goes between the forwards of another's step."""

    def hand_all_in() -> None:
        hand_in(thread, books, "trains", *["forward"] * 10, *["backward"] * 10)
        hand_in(thread, books, "generates", *["decode"] * 5)

    together(thread, hand_all_in)

    last = max(i for i, (tenant, _) in enumerate(books.done) if tenant == "generates")
    assert last <= 10


def test_one_who_begins_without_end_is_no_more_than_a_quantum_ahead(
    thread: TrunkThread, books: Books
):
    """A tenant whose graphs never end does not keep its turn for ever."""
    ahead_s: list[float] = []

    def note() -> None:
        ahead_s.append(books.seconds.get("greedy", 0.0) - books.seconds.get("modest", 0.0))

    def hand_all_in() -> None:
        hand_in(thread, books, "greedy", *["forward"] * 100)
        for _ in range(10):
            hand_in(thread, books, "modest", "forward", "backward", seconds=0.005)
            thread.submit(note, "modest")

    together(thread, hand_all_in)

    assert max(ahead_s) < QUANTUM_S + 0.03
    assert books.most_holders == 2


@pytest.mark.parametrize(("what", "quanta"), [("echo", 1), ("step", 10)])
def test_who_holds_a_graph_and_asks_without_end_lets_others_begin(
    books: Books, what: str, quanta: int
):
    """However cheap and whatever it is, a flood delays another's first forward by its quanta."""
    thread, seconds = TrunkThread(books.holders, quantum_s=0.01), 0.002

    def hand_all_in() -> None:
        hand_in(thread, books, "floods", "forward", *[what] * 100, seconds=seconds)
        hand_in(thread, books, "modest", "forward")

    together(thread, hand_all_in)

    before = books.done.index(("modest", "forward"))
    assert 1 <= before <= quanta * 0.01 / seconds + 1


class Company:
    """Work of all tenants that has a `Joint` is done together."""

    def awaited(self, _joint: Joint) -> set[str]:
        """Return them all."""
        return {"small", "little", "evaluates"}

    @contextlib.contextmanager
    def ahead(self, joints: Sequence[Joint]) -> Iterator[list[float]]:
        """Compute nothing ahead."""
        yield [0.0] * len(joints)


def test_who_is_awaited_gets_no_more_than_its_share_meanwhile(books: Books):
    """A tenant that evaluates without end does so before others' batch a quantum long at most."""
    thread = TrunkThread(books.holders, quantum_s=QUANTUM_S, together=Company())
    ahead_s: list[float] = []

    def note() -> None:
        ahead_s.append(books.seconds["evaluates"] - books.seconds["small"])

    def hand_all_in() -> None:
        hand_in(thread, books, "evaluates", *["decode"] * 100, seconds=0.02)
        for _ in range(5):
            for tenant in ("small", "little"):
                do = books.work(tenant, "forward", 0.01)
                thread.submit(do, tenant, begins=True, joint=Joint("forward", 1, None))
                thread.submit(books.work(tenant, "backward", 0.01), tenant, ends=True)
            thread.submit(note, "small")

    together(thread, hand_all_in)

    assert len(ahead_s) == 5
    assert max(ahead_s) <= 2 * QUANTUM_S


def test_the_time_is_shared_evenly_however_much_one_asks(thread: TrunkThread, books: Books):
    """Each of four gets a quarter within 10%: long requests, short ones, and ten times as many."""
    shares: dict[str, float] = {}
    asked = {"greedy": (10, 0.004), "long": (1, 0.02), "short": (4, 0.001), "plain": (2, 0.004)}

    def hand_all_in() -> None:
        for tenant, (at_once, seconds) in asked.items():
            step = ("forward",) * at_once + ("backward",) * at_once + ("step",)
            rounds = int(1.0 / (seconds * len(step)))
            hand_in(thread, books, tenant, *step * rounds, seconds=seconds)

    def look() -> None:
        while sum(books.seconds.values()) < 2.8:
            time.sleep(0.01)
        shares.update(books.seconds)

    watching = threading.Thread(target=look)
    watching.start()
    together(thread, hand_all_in)
    watching.join()

    fair = sum(shares.values()) / len(asked)
    assert all(0.9 * fair < shares[tenant] < 1.1 * fair for tenant in asked), shares
