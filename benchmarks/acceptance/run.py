"""What do the seventeen acceptance tests of the audit and the defenses measure?"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import ROOT, Result, commit, environment, parser_of, plain_settings  # noqa: E402

# The quick ones first, so that a run that is cut off has most of them.
NAMES = [
    "D1",
    "D3a",
    "D4",
    "D5",
    "D7",
    "D8",
    "neg",
    "A6",
    "A7",
    "A4",
    "A4c",
    "A5",
    "A2n",
    "A2",
    "A1c",
    "A1b",
    "A1",
]


def tests_of(name: str) -> list[str]:
    """Return the tests whose docstring begins with this id, as pytest names them."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "").startswith(
                f"T-{name}: "
            ):
                found.append(f"{path.relative_to(ROOT)}::{node.name}")
    return found


def measured_by(name: str, *, quick: bool) -> dict[str, float]:
    """Run the tests of one id; return its figures by test, and how many passed and failed."""
    report = Path(os.environ.get("TMPDIR", "/tmp")) / f"cutlayer-acceptance-{os.getpid()}.xml"
    words = ["-m", "not slow" if quick else "slow or not slow", "--timeout=3600", "-q"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *words, f"--junitxml={report}", *tests_of(name)],
        cwd=ROOT,
        env=environment(1, passive=False),
        stdout=sys.stderr,
        check=False,
    )
    figures: dict[str, float] = {f"T-{name}.passed": 0, f"T-{name}.failed": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        figures[f"T-{name}.{'failed' if failed else 'passed'}"] += 1
        for one in case.iter("property"):
            figure = f"T-{name}.{str(case.get('name')).removeprefix('test_')}.{one.get('name')}"
            figures[figure] = float(one.get("value", "nan"))
    report.unlink()
    return figures


def committed() -> tuple[dict[str, float], dict[str, str]]:
    """Return the figures of the newest result, and the commit that measured each id."""
    results = [json.loads(path.read_text()) for path in (HOME / "results").glob("*.json")]
    newest = max(results, key=lambda result: str(result["date"]))
    everywhere = dict.fromkeys(NAMES, newest["commit"])
    return newest["figures"], newest["settings"].get("measured_at", everywhere)


def main() -> None:
    """Run them all; what is done is kept, so that a run that was cut off goes on."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only", help="ids, as A1,A1b; the figures of the others are those of the newest result"
    )
    args = parser.parse_args()
    kept = ROOT / "out" / f"acceptance-{commit()}.jsonl"
    kept.parent.mkdir(exist_ok=True)
    done: dict[str, dict[str, float]] = {}
    if kept.exists() and not args.quick:
        done = dict(json.loads(line) for line in kept.read_text().splitlines())
    names = ["D5", "D8"] if args.quick else NAMES
    figures: dict[str, float] = {}
    measured_at: dict[str, str] = {}
    if args.only:
        names = [name for name in NAMES if name in args.only.split(",")]
        before, measured_at = committed()
        of_names = tuple(f"T-{name}." for name in names)
        figures = {
            key: value
            for key, value in before.items()
            if key.startswith("T-") and not key.startswith(of_names)
        }
    for name in names:
        if name not in done:
            done[name] = measured_by(name, quick=args.quick)
            if not args.quick:
                with kept.open("a") as file:
                    file.write(json.dumps([name, done[name]]) + "\n")
        figures |= done[name]
        measured_at = {**measured_at, name: commit()}
    totals = {
        f"acceptance_tests_{word}": sum(v for k, v in figures.items() if k.endswith(f".{word}"))
        for word in ("passed", "failed")
    }
    settings = plain_settings(args, measured_at=measured_at)
    Result({**totals, **figures}, settings).write(args, HOME)


if __name__ == "__main__":
    main()
