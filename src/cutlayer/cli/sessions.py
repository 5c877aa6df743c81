"""`cutlayer sessions`: the runs that a server knows, open and parked."""

from __future__ import annotations

import argparse
import datetime as dt
import time
from pathlib import Path
from typing import Any

from cutlayer.cli.main import add_format, report
from cutlayer.cli.status import facts_of
from cutlayer.cli.tenants import add_state_dir, journal_in
from cutlayer.errors import ConfigError, Refused

_STOPPED_WITHIN_S = 10.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    what = parser.add_subparsers(dest="what", required=True, metavar="list|show|stop")
    shown = what.add_parser("list", help="list the sessions")
    show = what.add_parser("show", help="show one session")
    stop = what.add_parser("stop", help="end a session; what was saved of its run stays")
    for child in (show, stop):
        child.add_argument("name", metavar="TENANT/RUN")
    for child in (shown, show, stop):
        add_state_dir(child)
        add_format(child)


def run(args: argparse.Namespace) -> int:
    """Do what is asked for.

    Raises:
        ConfigError: If there is no such session.
    """
    from cutlayer.server.session_table import SessionTable

    journal = journal_in(args.state_dir)
    try:
        table = SessionTable(journal)
        if args.what == "list":
            found = _sessions(table, Path(args.state_dir))
            text = "\n".join(map(_line, found)) or "no sessions"
            report(args.format, {"sessions": found}, text)
        elif args.what == "show":
            facts = _one(_sessions(table, Path(args.state_dir)), args.name)
            text = "\n".join(f"{key:<16} {value}" for key, value in facts.items())
            report(args.format, facts, text)
        else:
            facts = _stop(journal, table, Path(args.state_dir), args.name)
            report(args.format, facts, f"{args.name} was stopped; what was saved of it stays")
    finally:
        journal.close()
    return 0


def _sessions(table: Any, state_dir: Path) -> list[dict[str, Any]]:
    from cutlayer.wire.codecs import codec_words

    live = {(run["tenant"], run["run"]): run for run in facts_of(state_dir).get("runs", [])}
    found = []
    for entry in table.all():
        agreement, modules = entry.asked.agreement, entry.asked.lora.modules
        facts: dict[str, Any] = {
            "name": f"{entry.tenant}/{entry.run}",
            "tenant": entry.tenant,
            "run": entry.run,
            "state": "parked",
            "opened_s": entry.opened_s,
            "marked_s": entry.marked_s,
            "layers": f"{agreement.lower}:{agreement.upper}",
            "rank": max((module.rank for module in modules), default=0),
            "codec": codec_words(entry.asked.codecs),
        }
        now = live.get((entry.tenant, entry.run), {})
        found.append(facts | {k: now[k] for k in ("state", "step", "pending") if k in now})
    return found


def _line(facts: dict[str, Any]) -> str:
    opened = dt.datetime.fromtimestamp(facts["opened_s"], dt.UTC)
    step = f"step {facts['step']}" if "step" in facts else ""
    return (
        f"{facts['name']:<32} {facts['state']:<10} {step:<12} layers {facts['layers']:<8} "
        f"rank {facts['rank']:<4} opened {opened:%Y-%m-%d %H:%M} UTC"
    )


def _one(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    for facts in found:
        if facts["name"] == name:
            return facts
    raise ConfigError(f"there is no session '{name}': 'cutlayer sessions list' names them")


def _stop(journal: Any, table: Any, state_dir: Path, name: str) -> dict[str, Any]:
    """End a session through its server, or in the journal if none runs."""
    from cutlayer.server.orders import order_stop
    from cutlayer.server.presence import server_in
    from cutlayer.server.rows import drop_rows

    entries = {f"{entry.tenant}/{entry.run}": entry for entry in table.all()}
    entry = entries.get(name)
    if entry is None:
        raise ConfigError(f"there is no session '{name}': 'cutlayer sessions list' names them")
    if server_in(state_dir) is None:
        table.drop(entry.identifier)
        drop_rows(state_dir, entry.tenant, entry.run)
        return {"session": name, "state": "stopped", "by": "journal"}
    order_stop(journal, entry.identifier, entry.tenant)
    until_s = time.monotonic() + _STOPPED_WITHIN_S
    while time.monotonic() < until_s:
        if table.find(entry.identifier) is None:
            return {"session": name, "state": "stopped", "by": "server"}
        time.sleep(0.1)
    raise Refused(
        f"the server has not ended {name} within {_STOPPED_WITHIN_S:.0f} s: it will when the "
        "trunk is free; look again with 'cutlayer sessions list'"
    )
