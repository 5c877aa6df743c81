"""What a step is predicted to take, against arithmetic, bounds and a committed measurement."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.split.schedule import (
    Path as Link,
)
from cutlayer.split.schedule import (
    Work,
    best_chunks,
    chunk_counts,
    step_seconds,
)

MEASURED = Path(__file__).parents[2] / "benchmarks/step_overhead/results"

SECONDS = st.floats(0.0, 10.0)
BYTES = st.floats(0.0, 1e8)
WORKS = st.builds(
    Work,
    bottom_s=SECONDS,
    top_s=SECONDS,
    trunk_forward_s=SECONDS,
    trunk_backward_s=SECONDS,
    activations_up_bytes=BYTES,
    activations_down_bytes=BYTES,
    gradient_up_bytes=BYTES,
    gradient_down_bytes=BYTES,
    bottom_backward_s=SECONDS,
    step_s=SECONDS,
    client_s_per_chunk=st.floats(0.0, 0.1),
    server_s_per_chunk=st.floats(0.0, 0.1),
)
LINKS = st.builds(
    Link,
    up_bytes_per_s=st.floats(1e4, 1e10),
    down_bytes_per_s=st.floats(1e4, 1e10),
    rtt_s=st.floats(0.0, 1.0),
)
# A trunk that is the bottleneck: 1 s of client, 4 s of server.
WORK = Work(0.2, 0.8, 1.5, 2.5, 1e6, 1e6, 1e6, 1e6, bottom_backward_s=0.2)


@given(WORKS, LINKS)
@settings(max_examples=60, deadline=None)
def test_in_one_piece_everything_follows_everything(work: Work, link: Link) -> None:
    """One chunk takes the sum of all work, all transfers and two round trips."""
    up = (work.activations_up_bytes + work.gradient_up_bytes) / link.up_bytes_per_s
    down = (work.activations_down_bytes + work.gradient_down_bytes) / link.down_bytes_per_s
    client = work.bottom_s + work.top_s + work.bottom_backward_s + work.step_s
    server = work.trunk_forward_s + work.trunk_backward_s
    each = work.client_s_per_chunk + work.server_s_per_chunk
    expected = client + server + each + up + down + 2 * link.rtt_s
    assert step_seconds(work, link, 1).seconds == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(WORKS, LINKS, st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_no_step_is_shorter_than_its_busiest_resource(work: Work, link: Link, chunks: int) -> None:
    """The step lasts at least as long as any resource works, and its chain of waits adds up."""
    step = step_seconds(work, link, chunks)
    assert step.seconds >= max(step.busy_s.values()) * (1 - 1e-9)
    assert step.seconds <= step_seconds(work, link, 1).seconds + chunks * 0.2 + 1e-6
    assert sum(step.chain_s.values()) == pytest.approx(step.seconds, rel=1e-9, abs=1e-9)
    for name, busy_s in step.busy_s.items():
        assert step.chain_s[name] <= busy_s * (1 + 1e-9) + 1e-9


def test_many_chunks_hide_everything_behind_the_busiest() -> None:
    """Without overheads a step tends to what its busiest resource takes."""
    link = Link(1e8, 1e8, 0.05)
    busiest_s = max(step_seconds(WORK, link, 1).busy_s.values())
    assert step_seconds(WORK, link, 1).seconds > 1.3 * busiest_s
    assert step_seconds(WORK, link, 64).seconds < 1.05 * busiest_s


@pytest.mark.parametrize("chunks", [4, 8, 16])
@pytest.mark.parametrize("rtt_s", [0.0, 0.02, 0.05, 0.2])
def test_it_agrees_with_the_formula_of_a_full_pipeline(chunks: int, rtt_s: float) -> None:
    """With activations that are at the server already: max(C, S, U, D) + X, and one round trip.

    X = max(0, RTT + (D + C_top + U_gradient) / M - (M - 1) / M * S_forward). The round trip more
    is the first request's way there and the last reply's way back, which the formula leaves out.
    """
    work = Work(0.0, 0.5, 1.0, 2.0, 0.0, 2e6, 2e6)
    link = Link(1e7, 1e7, rtt_s)
    waits_s = rtt_s + (0.2 + 0.5 + 0.2) / chunks - (chunks - 1) / chunks * 1.0
    formula_s = 3.0 + max(0.0, waits_s)
    seconds = step_seconds(work, link, chunks).seconds
    assert formula_s - 1e-9 <= seconds <= formula_s + rtt_s + 1e-9


@pytest.mark.parametrize(
    ("work", "link", "binds"),
    [
        (WORK, Link(), "server"),
        (Work(1.0, 4.0, 0.5, 0.5, 1e6, 1e6, 1e6), Link(1e9, 1e9, 0.01), "client"),
        (Work(0.1, 0.1, 0.1, 0.1, 9e6, 1e6, 9e6), Link(1e6, 1e7, 0.01), "up"),
        (Work(0.1, 0.1, 0.1, 0.1, 1e6, 9e6, 1e6), Link(1e7, 1e6, 0.01), "down"),
        (Work(0.01, 0.01, 0.01, 0.01, 1e3, 1e3, 1e3), Link(1e7, 1e7, 0.5), "rtt"),
    ],
)
def test_it_says_what_binds(work: Work, link: Link, binds: str) -> None:
    """The resource that has nearly all of the work or of the waiting is named."""
    assert best_chunks(work, link, rows=8).binds == binds


def test_chunks_are_no_more_than_they_are_worth() -> None:
    """Overheads, rows and a fast link keep the count low; a far link raises it."""
    near, far = Link(1e9, 1e9, 0.0), Link(1e6, 1e6, 0.1)
    overheads = Work(0.2, 0.8, 1.5, 2.5, 1e6, 1e6, 1e6, 1e6, 0.2, client_s_per_chunk=1.0)
    assert best_chunks(overheads, near, rows=64).chunks < best_chunks(WORK, near, rows=64).chunks
    assert best_chunks(WORK, far, rows=2).chunks == 2
    assert best_chunks(WORK, far, rows=1).chunks == 1
    idle_client = Work(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    assert best_chunks(idle_client, near, rows=64).chunks == 1
    assert best_chunks(WORK, far, rows=64, most=4).chunks <= 4


def test_only_counts_that_differ_are_tried() -> None:
    """Of several counts with the same longest chunk the least is kept."""
    assert chunk_counts(8) == [1, 2, 3, 4, 8]
    assert chunk_counts(1) == [1]
    assert chunk_counts(64, most=4) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["2+2_1", "2+2_2", "2+2_4", "6+5_4", "7+4_4"])
def test_it_agrees_with_a_committed_measurement(name: str) -> None:
    """From each measured step's own parts it finds what the whole step took, within 5%."""
    found = sorted(MEASURED.glob("*.json"))
    figures = json.loads(found[0].read_text())["figures"]
    bottom_s, top_s, trunk_s = (figures[f"{part}_s_{name}"] for part in ("bottom", "top", "trunk"))
    # Of a bottom with adapters a third is forward; of a trunk with adapters too.
    values = 4 * 256 * 576 * 4
    work = Work(
        bottom_s / 3,
        top_s,
        trunk_s / 3,
        2 * trunk_s / 3,
        values,
        values,
        values,
        values,
        bottom_backward_s=2 * bottom_s / 3,
        step_s=figures[f"optimizer_s_{name}"],
    )
    chunks = int(name.rpartition("_")[2])
    step = step_seconds(work, Link(1e9, 1e9, 0.0), chunks)
    assert step.seconds == pytest.approx(figures[f"seconds_{name}"], rel=0.05)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_nonsense_is_refused(wrong: float) -> None:
    """A negative, infinite or undefined number is no duration, and no bandwidth."""
    with pytest.raises(ValueError, match="top_s="):
        Work(0.0, wrong, 0.0, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="at least 0"):
        Link(1.0, 1.0, wrong if wrong != math.inf else -1.0)
    with pytest.raises(ValueError, match="chunks=0"):
        step_seconds(WORK, Link(), 0)
    with pytest.raises(ValueError, match="rows=0"):
        best_chunks(WORK, Link(), rows=0)
