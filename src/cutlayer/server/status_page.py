"""The status page: what the server does now, for a person. No script, nothing from elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from cutlayer.server.metrics import Metrics

__all__ = ["Status", "rendered"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Status:
    """The facts of the moment, for the page and for `cutlayer status`."""

    def __init__(self, metrics: Metrics, about: Mapping[str, Any]) -> None:
        """Take what does not change, and what gives the rest.

        Args:
            metrics: The numbers.
            about: Version, model, layers, address and authentication of the server.
        """
        self.metrics = metrics
        self.about = dict(about)
        self.is_serving: Callable[[], bool] = lambda: True
        """Says whether new work is taken; set by who knows."""
        self.audit_head: Callable[[], dict[str, Any]] = dict
        """Gives lines and hash of the audit log's end; set by who has one."""

    def facts(self) -> dict[str, Any]:
        """Return what is true now: plain values, no session's id."""
        runs = sorted(self.metrics.runs(), key=lambda run: (run.tenant, run.run))
        table = self.metrics.table()
        names = sorted({name for name in table if name} | {run.tenant for run in runs})
        tenants = []
        for name in names:
            row = table.get(name, {})
            waits = row.get("queue_seconds_count", 0.0)
            tenants.append(
                {
                    "name": name,
                    "sessions": sum(run.tenant == name and run.state != "parked" for run in runs),
                    "steps": int(row.get("steps_total", 0)),
                    "tokens": int(row.get("tokens_total", 0)),
                    "tokens_per_s": self.metrics.tokens_per_s(name),
                    "received_bytes": int(row.get("tensor_bytes_total:received", 0)),
                    "sent_bytes": int(row.get("tensor_bytes_total:sent", 0)),
                    "mean_wait_s": row.get("queue_seconds_sum", 0.0) / waits if waits else 0.0,
                    "memory_bytes": sum(run.memory_bytes for run in runs if run.tenant == name),
                    "refusals": _refusals(row),
                }
            )
        return {
            **self.about,
            "serving": self.is_serving(),
            "time_s": time.time(),
            "uptime_s": time.time() - self.metrics.started_s,
            "queue_depth": self.metrics.queue_depth(),
            "resident_bytes": _resident_bytes(),
            "tokens_per_s": sum(tenant["tokens_per_s"] for tenant in tenants),
            "tenants": tenants,
            "runs": [{k: v for k, v in asdict(run).items() if k != "session"} for run in runs],
            "refusals_of_unknown": sum(_refusals(table.get("", {})).values()),
            "audit_log": self.audit_head(),
        }


def rendered(facts: Mapping[str, Any], *, again: bool = False) -> str:
    """Return the page as HTML; every name in it is escaped.

    Args:
        facts: What `Status.facts` gave.
        again: Whether the page loads itself again; only if a reader asked for that.
    """
    return _template().render(facts=facts, again=again)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": _size, "span": _span, "count": "{:,}".format, "date": _date}
    return environment.get_template("status_page.html.j2")


def _refusals(row: Mapping[str, float]) -> dict[str, int]:
    prefix = "refused_total:"
    return {key[len(prefix) :]: int(n) for key, n in row.items() if key.startswith(prefix)}


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _size(number: float) -> str:
    power = 0
    while number >= 1024 and power < len(_UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.0f} {_UNITS[power]}" if power == 0 else f"{number:.1f} {_UNITS[power]}"


def _span(seconds: float) -> str:
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds * 1e3:.0f} ms"


def _date(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))
