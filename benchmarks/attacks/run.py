"""What does a server read of real text on real weights?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.attacks.parts import Part, Parts  # noqa: E402
from benchmarks.common import (  # noqa: E402
    ROOT,
    Result,
    commit,
    make_workload,
    parser_of,
    scratch,
    settings_of,
)

PARTIAL = ROOT / ".data" / "attacks.partial.jsonl"


def unchanged(since: str, reads: Sequence[str]) -> bool:
    """Say whether these files are now what they were at a commit."""
    words = ["git", "diff", "--quiet", since, "--", *reads]
    return subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 0


class Kept:
    """The figures of finished parts, of this commit and of earlier ones."""

    def __init__(self) -> None:
        """Read what is there."""
        lines = PARTIAL.read_text().splitlines() if PARTIAL.exists() else []
        self._lines = [json.loads(line) for line in lines]

    def of(self, part: Part) -> tuple[dict[str, float], str] | None:
        """Return a part's figures and the commit that measured them, if they still hold."""
        for line in reversed(self._lines):
            if line["part"] == part.name and unchanged(line["commit"], part.reads):
                return line["figures"], line["commit"]
        return None

    def keep(self, part: Part, figures: dict[str, float]) -> None:
        """Write down a part, unless the source that it ran is of no commit."""
        if figures and unchanged("HEAD", part.reads):
            line = {"part": part.name, "commit": commit(), "figures": figures}
            with PARTIAL.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    """Attack."""
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no part after so many")
    parser.add_argument("--only", nargs="+", help="measure no other parts than these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    measured_at: dict[str, str] = {}
    left: list[str] = []
    began = time.monotonic()
    kept = Kept()
    with scratch() as folder:
        workload = make_workload(args, folder, rows=1, columns=1, batches=1)
        parts = Parts(workload.model, args.text, folder, PARTIAL.parent, args.quick)
        for part in parts.all():
            before = None if args.quick else kept.of(part)
            if before is None:
                late = time.monotonic() - began > 60 * args.minutes
                if late or (args.only and part.name not in args.only):
                    left.append(part.name)
                    continue
                before = part.measure(), commit()
                if not args.quick:
                    kept.keep(part, before[0])
            found, measured_at[part.name] = before
            minutes = (time.monotonic() - began) / 60
            print(f"{minutes:6.1f}", part.name, found, file=sys.stderr, flush=True)
            figures |= found
        settings = settings_of(
            workload,
            args,
            text="ICD-10-CM wordings; gpt2: the same ids modulo 4096, random weights",
            skipped=list(parts.skipped.values()),
            measured_at=measured_at,
            parts_not_run=left,
        )
    for foreign in ("batch", "lora", "optimizer", "tls"):
        del settings[foreign]
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
