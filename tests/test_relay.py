"""The benchmarks' link is as wide and as long as it says."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from benchmarks.relay import Direction, Link


def test_bytes_wait_for_those_before_them_and_then_travel():
    """1000 bytes a second and a tenth of a second's way, on a clock of the test's own."""
    way = Direction(bytes_per_s=1000.0, delay_s=0.1)

    assert way.due_s(500, now_s=0.0) == pytest.approx(0.6)
    assert way.due_s(500, now_s=0.2) == pytest.approx(1.1)  # it had to wait
    assert way.due_s(500, now_s=5.0) == pytest.approx(5.6)  # the link had been idle


@pytest.mark.parametrize(("mbit_s", "rtt_ms"), [(20.0, 50.0), (100.0, 40.0)])
def test_a_probe_finds_what_was_asked_for(mbit_s: float, rtt_ms: float):
    """Bandwidth both ways and round trip within 10% of what they should be."""
    with Link([], mbit_s=mbit_s, rtt_ms=rtt_ms) as link:
        found = link.measured()

    assert found["mbit_s_up"] == pytest.approx(mbit_s, rel=0.1)
    assert found["mbit_s_down"] == pytest.approx(mbit_s, rel=0.1)
    assert found["rtt_ms"] == pytest.approx(rtt_ms, rel=0.1)


def test_both_ways_are_open_at_once():
    """A transfer up and one down together take as long as one of them."""
    size, mbit_s = 500_000, 20.0
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Link([listener.getsockname()[1]], mbit_s=mbit_s) as link,
    ):
        near = socket.create_connection(("127.0.0.1", link.ports[0]))
        far, _ = listener.accept()
        started_s = time.monotonic()
        sending = [threading.Thread(target=end.sendall, args=(bytes(size),)) for end in (near, far)]
        reading = [threading.Thread(target=_read, args=(end, size)) for end in (near, far)]
        for thread in (*sending, *reading):
            thread.start()
        for thread in (*sending, *reading):
            thread.join()
        took_s = time.monotonic() - started_s
        passed = link.passed_bytes()
        near.close()
        far.close()

    assert took_s == pytest.approx(8 * size / (mbit_s * 1e6), rel=0.1)
    assert passed == {"up": size, "down": size}


def _read(end: socket.socket, nbytes: int) -> None:
    while nbytes:
        nbytes -= len(end.recv(min(nbytes, 1 << 16)))


def test_a_link_that_is_not_as_it_should_be_is_told():
    """A benchmark ends rather than report figures of another link."""
    with Link([], mbit_s=20.0, rtt_ms=50.0) as link:
        link.mbit_s = 40.0
        with pytest.raises(SystemExit, match=r"was to have 40\.0 Mbit/s and has"):
            link.probed()
