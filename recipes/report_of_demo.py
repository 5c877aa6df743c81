#!/usr/bin/env python3
"""Make the audit's report of a finished `make demo`, as a file and as a picture: `make report`.

The demo's text is ICD-10-CM wording, which is in the public domain: only a report of such text may
be published. The picture is what headless Chromium shows of the file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

WIDTH, HEIGHT = 960, 1600  # of the picture: the verdicts, the checks and the first sample


def main() -> int:
    """Audit, copy, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("out/demo/run"), help="the demo's run")
    parser.add_argument("--output", type=Path, default=Path("docs/report"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not (args.run / "transcript").is_dir():
        sys.exit(f"'{args.run}' has no transcript: run 'make demo' first")
    browser = shutil.which("chromium") or sys.exit("chromium is missing: install it")
    args.output.mkdir(parents=True, exist_ok=True)
    page = args.output / "demo-report.html"
    folder = args.run.parent / "report"  # one that was interrupted goes on there
    words = ["audit", "--run", str(args.run), "--output", str(folder), "--samples", "8"]
    words += ["--tokens", "12", "--threads", str(args.threads)]
    subprocess.run([sys.executable, "-m", "cutlayer.cli.main", *words], check=True)
    page.write_bytes((folder / "audit.html").read_bytes())
    photograph(browser, page, page.with_suffix(".png"))
    return 0


def photograph(browser: str, page: Path, picture: Path) -> None:
    """Write what a browser shows of the page's beginning."""
    words = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-color-profile=srgb"]
    words += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture.resolve()}"]
    subprocess.run(
        [browser, *words, page.resolve().as_uri()], check=True, stderr=subprocess.DEVNULL
    )
    print(f"{page} and {picture}, {picture.stat().st_size // 1000} kB")


if __name__ == "__main__":
    sys.exit(main())
