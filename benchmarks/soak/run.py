"""Does a server that tenants come to and vanish from for half an hour grow?"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    MIB,
    Result,
    make_certificates,
    make_workload,
    median,
    parser_of,
    plain_settings,
    scratch,
)
from benchmarks.processes import Server, memory_bytes  # noqa: E402
from benchmarks.tenants.run import Tenant  # noqa: E402

NAMES, AT_ONCE, LEASE_S = 12, 6, 3.0


def look(pid: int) -> dict[str, float]:
    """Return what a process holds now."""
    home = Path(f"/proc/{pid}")
    return {
        "rss_mib": memory_bytes(pid)["rss"] / MIB,
        "fds": len(list((home / "fd").iterdir())),
        "threads": len(list((home / "task").iterdir())),
    }


def vanish(tenant: Tenant) -> None:
    """Be gone without a word."""
    tenant.connection._closing.set()
    tenant.connection._channel.close()


def churn(server: Server, certs: Any, work: Any, seconds: float) -> list[dict[str, float]]:
    """Let tenants come, train, pause, leave and vanish; look at the server between."""
    rng = random.Random(11)
    here: dict[str, Tenant] = {}
    steps: dict[str, int] = {}
    seen: list[dict[str, float]] = []
    until_s = time.monotonic() + seconds
    next_look_s = time.monotonic()
    while time.monotonic() < until_s:
        name = f"tenant-{rng.randrange(NAMES)}"
        if name not in here:
            if len(here) >= AT_ONCE:
                leaver = rng.choice(sorted(here))
                gone = here.pop(leaver)
                vanish(gone) if rng.random() < 0.5 else gone.connection.close()
            here[name], steps[name] = Tenant.of(name, server, certs, work), 0
        for _ in range(rng.randrange(1, 6)):
            steps[name] += 1
            here[name].in_flight = rng.randrange(1, 5)
            here[name].step(steps[name])
        if rng.random() < 0.05:
            time.sleep(1.5 * LEASE_S)  # all are parked, and resume by themselves
        if time.monotonic() > next_look_s:
            seen.append(look(server.pid))
            next_look_s += max(seconds / 180, 0.5)
    for tenant in here.values():
        tenant.connection.close()
    return seen


def main() -> None:
    """Churn, and compare the end with the time after warming up."""
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parser.parse_args()
    quick = args.quick
    torch.set_num_threads(1)
    seconds = 20.0 if quick else 60 * args.minutes
    with scratch() as folder:
        args.quick = True
        work = make_workload(args, folder)
        args.quick = quick
        certs = make_certificates(folder / "certs")
        with Server(work, certs, folder, passive=True, lease_s=LEASE_S) as server:
            seen = churn(server, certs, work, seconds)
    warm = seen[len(seen) // 5 :]
    fifth = max(len(warm) // 5, 1)
    first, last = warm[:fifth], warm[-fifth:]

    def grown(what: str) -> tuple[float, float]:
        return median([s[what] for s in first]), median([s[what] for s in last])

    rss, fds, threads = grown("rss_mib"), grown("fds"), grown("threads")
    figures = {
        "rss_growth": rss[1] / rss[0] - 1,
        "fd_growth": fds[1] - fds[0],
        "thread_growth": threads[1] - threads[0],
        "rss_mib": rss[1],
        "fds": fds[1],
        "threads": threads[1],
        "minutes": seconds / 60,
    }
    settings = plain_settings(args, model=work.name, names=NAMES, at_once=AT_ONCE, lease_s=LEASE_S)
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
