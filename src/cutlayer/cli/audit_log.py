"""`cutlayer audit-log verify`: is a server's audit log what the server wrote?"""

from __future__ import annotations

import argparse
from pathlib import Path

from cutlayer.cli.main import add_format, report


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    what = parser.add_subparsers(dest="what", required=True, metavar="verify")
    verify = what.add_parser("verify", help="find a changed, missing, moved or torn line")
    verify.add_argument("file", help="the log: audit.jsonl in the server's --state_dir")
    verify.add_argument(
        "--head", help="a hash that was noted earlier: finds lines that were cut off at the end"
    )
    add_format(verify)


def run(args: argparse.Namespace) -> int:
    """Check the log and tell where it ends.

    Raises:
        ConfigError: If there is no such file.
        Tampered: Naming the first line that does not hold.
    """
    from cutlayer.server.audit_log import verify

    head = verify(Path(args.file), args.head)
    facts = {"file": args.file, "lines": head.lines, "head": head.hash}
    text = f"{args.file} holds: {head.lines} lines; note the head elsewhere: {head.hash}"
    report(args.format, facts, text)
    return 0
