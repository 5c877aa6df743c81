"""`cutlayer checkpoints`: what a server keeps of its tenants' runs."""

from __future__ import annotations

import argparse
import datetime as dt
from pathlib import Path
from typing import Any

from cutlayer.cli.main import add_format, report
from cutlayer.cli.tenants import add_audit_log, add_state_dir, audit_log_of, whoever
from cutlayer.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    what = parser.add_subparsers(dest="what", required=True, metavar="list|delete")
    shown = what.add_parser("list", help="list the saved states, and rows that are sent once")
    shown.add_argument("--tenant", help="of this tenant only")
    delete = what.add_parser("delete", help="delete the saved states and the rows of a run")
    delete.add_argument("name", metavar="TENANT/RUN")
    only = delete.add_mutually_exclusive_group()
    only.add_argument("--step", type=int, help="only the state of this step")
    only.add_argument("--rows", action="store_true", help="only its rows; it sends them again")
    add_audit_log(delete)
    for child in (shown, delete):
        add_state_dir(child)
        add_format(child)


def run(args: argparse.Namespace) -> int:
    """List or delete.

    Raises:
        ConfigError: If there is nothing of that name.
        StorageError: If it cannot be deleted.
    """
    from cutlayer.server.rows import drop_rows, row_bytes
    from cutlayer.server.shelf import delete, kept_in

    root = Path(args.state_dir)
    if not root.is_dir():
        raise ConfigError(f"--state_dir '{root}' is not there: name the folder of the server")
    if args.what == "list":
        found = [_facts(kept) for kept in kept_in(root, args.tenant or "*")]
        rows = [
            {"tenant": tenant, "run": run, "size_bytes": size}
            for (tenant, run), size in row_bytes(root, args.tenant or "*").items()
        ]
        text = "\n".join([*map(_line, found), *map(_rows_line, rows)]) or "no saved states"
        report(args.format, {"checkpoints": found, "rows": rows}, text)
        return 0
    tenant, _, name = args.name.partition("/")
    audit = audit_log_of(args)
    rows_too = args.rows or (args.step is None and bool(row_bytes(root, tenant, name)))
    states_too = not args.rows and (not rows_too or bool(kept_in(root, tenant, name)))
    gone = delete(root, tenant, name, args.step) if states_too else []
    gone_bytes = drop_rows(root, tenant, name) if rows_too else 0
    if gone_bytes:
        by = whoever()
        audit.write("deleted", tenant=tenant, run=name, row_bytes=gone_bytes, by=by)
    for kept in gone:
        audit.write(
            "deleted",
            tenant=tenant,
            run=name,
            step=kept.step,
            size_bytes=kept.size_bytes,
            by=whoever(),
        )
    audit.close()
    steps = ", ".join(str(kept.step) for kept in gone) or "none"
    facts = {"deleted": [_facts(kept) for kept in gone], "row_bytes": gone_bytes}
    text = f"deleted of {args.name}: states of step {steps}, {gone_bytes} bytes of rows"
    report(args.format, facts, text)
    return 0


def _facts(kept: Any) -> dict[str, Any]:
    return {
        "tenant": kept.tenant,
        "run": kept.run,
        "step": kept.step,
        "size_bytes": kept.size_bytes,
        "saved_s": kept.saved_s,
    }


def _line(facts: dict[str, Any]) -> str:
    saved = dt.datetime.fromtimestamp(facts["saved_s"], dt.UTC)
    name = f"{facts['tenant']}/{facts['run']}"
    size = f"{facts['size_bytes'] / (1 << 20):.1f} MiB"
    return f"{name:<32} step {facts['step']:<8} {size:>12}  saved {saved:%Y-%m-%d %H:%M} UTC"


def _rows_line(facts: dict[str, Any]) -> str:
    name = f"{facts['tenant']}/{facts['run']}"
    return f"{name:<32} rows          {facts['size_bytes'] / (1 << 20):>12.1f} MiB"
