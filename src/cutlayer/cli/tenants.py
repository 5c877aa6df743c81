"""`cutlayer tenants`: who may use this server, and for how much.

It writes the journal in --state_dir, beside a server that runs or not; a running one knows within a
second.
"""

from __future__ import annotations

import argparse
import datetime as dt
import getpass
import os
from pathlib import Path
from typing import Any

from cutlayer.cli.main import add_format, report
from cutlayer.errors import ConfigError

__all__ = [
    "add_audit_log",
    "add_quotas",
    "add_state_dir",
    "audit_log_of",
    "journal_in",
    "quotas_of",
    "whoever",
]

_DONE = {
    "add": "tenant added",
    "limit": "tenant limited",
    "rotate": "tenant rotated",
    "revoke": "tenant revoked",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    what = parser.add_subparsers(dest="what", required=True, metavar="add|list|limit|rotate|revoke")
    add = what.add_parser("add", help="add a tenant and print its token, this once")
    add.add_argument("name", help="its name; with client certificates, their common name")
    add.add_argument("--no_token", action="store_true", help="it comes by certificate alone")
    limit = what.add_parser("limit", help="change a tenant's quotas")
    limit.add_argument("name")
    for child in (add, limit):
        add_quotas(child, "in place of the server's default; 0: no limit")
    shown = what.add_parser("list", help="list the tenants and their quotas")
    rotate = what.add_parser("rotate", help="replace a tenant's token, and print the new one")
    rotate.add_argument("name")
    rotate.add_argument(
        "--overlap_s", type=float, default=0.0, help="seconds the old token still works (default 0)"
    )
    revoke = what.add_parser("revoke", help="let a tenant in no more, token and certificate")
    revoke.add_argument("name")
    for child in (add, limit, rotate, revoke):
        add_audit_log(child)
    for child in (add, limit, shown, rotate, revoke):
        add_state_dir(child)
        add_format(child)


def run(args: argparse.Namespace) -> int:
    """Do what is asked for.

    Raises:
        ConfigError: If the tenant is unknown, or there already.
        StorageError: If the journal cannot be written.
    """
    from cutlayer.server.tenants import Register

    journal = journal_in(args.state_dir, make=args.what == "add")
    register = Register(journal)
    try:
        # Opened first: a token that is made and then not printed is lost.
        audit = audit_log_of(args) if args.what in _DONE else None
        facts, text = _ACTIONS[args.what](register, args)
        if audit is not None:
            audit.write(_DONE[args.what], tenant=args.name, by=whoever())
            audit.close()
    finally:
        register.close()
        journal.close()
    report(args.format, facts, text)
    return 0


def _add(register: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    token = register.add(args.name, quotas_of(args), with_token=not args.no_token)
    facts = {"tenant": args.name, "token": token or None}
    return facts, token or f"tenant '{args.name}' comes by its certificate"


def _limit(register: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    quotas = register.limit(args.name, quotas_of(args))
    said = ", ".join(f"{key}={value}" for key, value in quotas.items())
    return {"tenant": args.name, "quotas": quotas}, f"tenant '{args.name}': {said or 'no quotas'}"


def _rotate(register: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    token = register.rotate(args.name, overlap_s=args.overlap_s)
    return {"tenant": args.name, "token": token, "overlap_s": args.overlap_s}, token


def _revoke(register: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    register.revoke(args.name)
    return {"tenant": args.name, "state": "revoked"}, f"tenant '{args.name}' is let in no more"


def _list(register: Any, _args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    facts = [tenant.facts() for tenant in register.tenants()]
    lines = [
        f"{t['name']:<24} {t['state']:<8} {'token' if t['has_token'] else 'no token':<9} "
        f"since {dt.datetime.fromtimestamp(t['created_s'], dt.UTC):%Y-%m-%d}  "
        + ", ".join(f"{key}={value}" for key, value in t["quotas"].items())
        for t in facts
    ]
    return {"tenants": facts}, "\n".join(lines) or "no tenants: 'cutlayer tenants add NAME'"


_ACTIONS = {"add": _add, "limit": _limit, "list": _list, "rotate": _rotate, "revoke": _revoke}


def add_quotas(parser: argparse.ArgumentParser, note: str) -> None:
    """Add one flag a quota."""
    from cutlayer.server.quotas import QUOTAS

    for name in QUOTAS:
        words = name.replace("_", " ")
        parser.add_argument(f"--quota_{name}", type=int, metavar="N", help=f"{words}, {note}")


def quotas_of(args: argparse.Namespace) -> dict[str, int]:
    """Return the quotas that the flags give.

    Raises:
        ConfigError: If one is negative.
    """
    from cutlayer.server.quotas import QUOTAS

    given = {name: getattr(args, f"quota_{name}") for name in QUOTAS}
    wrong = [f"--quota_{name} {n}" for name, n in given.items() if n is not None and n < 0]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: a quota is 0, for no limit, or more")
    return {name: number for name, number in given.items() if number is not None}


def add_state_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--state_dir`, which every verb of an operator has."""
    parser.add_argument(
        "--state_dir", default="cutlayer-state", help="the server's (default: cutlayer-state)"
    )


def add_audit_log(parser: argparse.ArgumentParser) -> None:
    """Add `--audit_log`, which every verb has that changes something."""
    parser.add_argument("--audit_log", help="the server's (default: audit.jsonl in --state_dir)")


def audit_log_of(args: argparse.Namespace) -> Any:
    """Open the audit log that the flags name.

    Raises:
        StorageError: If it cannot be written, or its end does not hold.
    """
    from cutlayer.server.audit_log import AUDIT_LOG, AuditLog

    return AuditLog(Path(args.audit_log or Path(args.state_dir) / AUDIT_LOG))


def whoever() -> str:
    """Return the name of who runs this, or the number where a container gives that no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return f"uid {os.getuid()}"


def journal_in(state_dir: str, *, make: bool = False) -> Any:
    """Open the journal of a server's folder.

    Raises:
        ConfigError: If no server has ever used the folder, and it is not to be made.
    """
    from cutlayer.server.database import Journal

    folder = Path(state_dir)
    if not make and not folder.is_dir():
        raise ConfigError(f"--state_dir '{folder}' is not there: name the folder of the server")
    return Journal(folder)
