"""`cutlayer status`: does the server of this folder run, and what does it do?"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

from cutlayer.cli.main import add_format, report
from cutlayer.cli.tenants import add_state_dir
from cutlayer.errors import ConfigError

__all__ = ["facts_of"]

_TIMEOUT_S = 5.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    add_state_dir(parser)
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Tell what is known of the server.

    Raises:
        ConfigError: If there is no such folder.
    """
    folder = Path(args.state_dir)
    if not folder.is_dir():
        raise ConfigError(f"--state_dir '{folder}' is not there: name the folder of the server")
    facts = facts_of(folder)
    report(args.format, facts, _text(facts))
    return 0 if facts["running"] else 1


def facts_of(state_dir: Path) -> dict[str, Any]:
    """Return what a server says of itself; `running` alone if there is none."""
    from cutlayer.server.presence import server_in

    found = server_in(state_dir)
    if found is None:
        return {"running": False}
    facts = {"running": True, **found}
    if found.get("metrics"):
        try:
            with urllib.request.urlopen(  # noqa: S310  # written by our own server
                f"{found['metrics']}status.json", timeout=_TIMEOUT_S
            ) as reply:
                facts |= json.loads(reply.read())
        except (OSError, ValueError) as error:
            facts["metrics_error"] = str(error)
    return facts


def _text(facts: dict[str, Any]) -> str:
    if not facts["running"]:
        return "no server runs in this folder"
    lines = [
        f"{facts.get('model', 'a server')} at {facts.get('address')} (pid {facts['pid']}), up for "
        f"{time.time() - facts['started_s']:.0f} s"
    ]
    if "tenants" in facts:
        lines.append(
            f"{facts['tokens_per_s']:.1f} tokens/s in the last minute, {facts['queue_depth']} "
            f"requests waiting, {facts['resident_bytes'] / (1 << 20):.0f} MiB"
        )
        lines += [
            f"{t['name']:<24} {t['sessions']:>3} sessions  {t['steps']:>8} steps  "
            f"{t['tokens']:>12} tokens  mean wait {t['mean_wait_s']:.3f} s"
            for t in facts["tenants"]
        ]
    else:
        lines.append("start it with --metrics_port to see what it does")
    return "\n".join(lines)
