#!/usr/bin/env python3
"""Write training and held-out chat samples: an ICD-10-CM diagnosis wording and its chapter.

The wordings are the real ones of ICD-10-CM (United States government, public domain): code titles
and their inclusion terms, read from the XML file in the PyPI package ``simple-icd-10-cm``, of which
no code is imported.  Each sample is one line of JSON in TRL's conversational prompt/completion
format.  Example::

    python recipes/prepare_icd10.py --output .data/icd10

The split is by three-character category (``J20`` with all its subcodes): a category gives wordings
either to training or to the test, never to both, and a training wording that is, but for case and
blanks, equal to a test wording is dropped too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PACKAGE = "simple-icd-10-cm"
PACKAGE_HINT = "pip install simple-icd-10-cm==1.5.0"

# The chapters by their official number, under short names: an official title such as "Diseases of
# the respiratory system" costs three more tokens a sample, the same three in nearly every chapter.
# Chapter 22, "Codes for special purposes", has two categories only and is left out.
CHAPTERS = {
    1: "Infectious and parasitic diseases",
    2: "Neoplasms",
    3: "Blood and immune disorders",
    4: "Endocrine and metabolic diseases",
    5: "Mental and behavioral disorders",
    6: "Nervous system diseases",
    7: "Eye diseases",
    8: "Ear diseases",
    9: "Circulatory diseases",
    10: "Respiratory diseases",
    11: "Digestive diseases",
    12: "Skin diseases",
    13: "Musculoskeletal diseases",
    14: "Genitourinary diseases",
    15: "Pregnancy and childbirth",
    16: "Perinatal conditions",
    17: "Congenital malformations",
    18: "Symptoms and signs",
    19: "Injury and poisoning",
    20: "External causes",
    21: "Health services contact",
}

# Said in place of SmolLM2's own system message, which would cost more tokens and say less.
INSTRUCTION = "Name the ICD chapter."

# A wording that points at codes ("... classifiable to O10-O11") is about the book, not the patient.
CODE = re.compile(r"\b[A-Z]\d[0-9A-Z]\b")


class PrepareError(Exception):
    """Something the person running the script has to put right."""


@dataclass(frozen=True)
class Wording:
    """One diagnosis wording with its chapter number and its three-character category."""

    text: str
    chapter: int
    category: str

    @property
    def key(self) -> str:
        """The text without differences of case and blanks."""
        return " ".join(self.text.casefold().split())

    def sample(self) -> dict[str, list[dict[str, str]]]:
        """Return this wording as a chat sample."""
        return {
            "prompt": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": self.text},
            ],
            "completion": [{"role": "assistant", "content": CHAPTERS[self.chapter]}],
        }


def find_tabular_list() -> Path:
    """Return the path of the ICD-10-CM XML file inside the installed package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise PrepareError(f"The ICD-10-CM wordings are missing: run `{PACKAGE_HINT}`.") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".xml" and path.is_file():
            return path
    raise PrepareError(f"The installed {PACKAGE} holds no XML file: run `{PACKAGE_HINT}`.")


def read_wordings(path: Path, max_chars: int) -> list[Wording]:
    """Return the usable wordings of the tabular list, each once, in the order of the book."""

    def walk(diagnosis: ElementTree.Element, chapter: int, category: str) -> Iterator[Wording]:
        titles = [diagnosis.find("desc"), *diagnosis.iterfind("inclusionTerm/note")]
        for title in titles:
            text = "" if title is None else " ".join((title.text or "").split())
            if 4 <= len(text) <= max_chars and not CODE.search(text):
                yield Wording(text, chapter, category)
        for child in diagnosis.iterfind("diag"):
            yield from walk(child, chapter, category)

    found: dict[str, Wording] = {}
    chapters_of: dict[str, set[int]] = defaultdict(set)
    for element in ElementTree.parse(path).getroot().iterfind("chapter"):
        chapter = int(element.findtext("name", "0"))
        if chapter not in CHAPTERS:
            continue
        for diagnosis in element.iterfind("section/diag"):
            for wording in walk(diagnosis, chapter, diagnosis.findtext("name", "")):
                found.setdefault(wording.key, wording)
                chapters_of[wording.key].add(chapter)
    # The same words in two chapters have no right answer.
    return [wording for key, wording in found.items() if len(chapters_of[key]) == 1]


def spread(total: int, parts: int) -> list[int]:
    """Return ``parts`` whole numbers as even as can be that add up to ``total``."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def split(
    wordings: Sequence[Wording], train: int, test: int, seed: int
) -> tuple[list[Wording], list[Wording]]:
    """Return the training and the test wordings, evenly over chapters, disjoint by category.

    Each test wording comes from a category of its own, so that they are independent questions.
    Training goes round the remaining categories of a chapter, one wording of each at a time.
    """
    rng = random.Random(seed)
    by_category: dict[int, dict[str, list[Wording]]] = {chapter: {} for chapter in CHAPTERS}
    for wording in wordings:
        by_category[wording.chapter].setdefault(wording.category, []).append(wording)

    chosen: dict[int, list[str]] = {}
    test_rows: list[Wording] = []
    for (chapter, categories), count in zip(
        by_category.items(), spread(test, len(CHAPTERS)), strict=True
    ):
        if count > len(categories) // 2:
            raise PrepareError(
                f"--test {test} is too many: it would take {count} of the {len(categories)} "
                f"categories of '{CHAPTERS[chapter]}'."
            )
        chosen[chapter] = rng.sample(sorted(categories), count)
        test_rows += [rng.choice(categories[category]) for category in chosen[chapter]]

    test_keys = {wording.key for wording in test_rows}
    train_rows: list[Wording] = []
    for (chapter, categories), count in zip(
        by_category.items(), spread(train, len(CHAPTERS)), strict=True
    ):
        queues = []
        for category in sorted(set(categories) - set(chosen[chapter])):
            queue = [wording for wording in categories[category] if wording.key not in test_keys]
            rng.shuffle(queue)
            queues.append(queue)
        rng.shuffle(queues)
        taken: list[Wording] = []
        while len(taken) < count and any(queues):
            taken += [queue.pop() for queue in queues if queue][: count - len(taken)]
        train_rows += taken
    rng.shuffle(train_rows)
    rng.shuffle(test_rows)
    return train_rows, test_rows


def write_json_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write rows as JSON lines, aside first, so that no half-written file is ever seen."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 2 the person must act)."""
    parser = argparse.ArgumentParser(
        description="Write ICD-10-CM chat samples: train.jsonl, test.jsonl and categories.json."
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    parser.add_argument("--train", type=int, default=2100, help="training rows (default: 2100)")
    parser.add_argument("--test", type=int, default=200, help="held-out rows (default: 200)")
    parser.add_argument(
        "--max-chars",
        type=int,
        default=48,
        help="leave longer wordings out, as length is cost (default: 48)",
    )
    args = parser.parse_args(argv)
    if args.train < 1 or args.test < 1:
        parser.error("--train and --test must be 1 or more")
    try:
        wordings = read_wordings(find_tabular_list(), args.max_chars)
        train, test = split(wordings, args.train, args.test, args.seed)
        args.output.mkdir(parents=True, exist_ok=True)
        write_json_lines(args.output / "train.jsonl", [row.sample() for row in train])
        write_json_lines(args.output / "test.jsonl", [row.sample() for row in test])
        categories = {
            name: sorted({row.category for row in rows})
            for name, rows in (("train", train), ("test", test))
        }
        write_json_lines(args.output / "categories.json", [categories])
    except (PrepareError, OSError) as error:
        print(f"prepare_icd10: {error}", file=sys.stderr)
        return 2

    in_train, in_test = (Counter(row.chapter for row in rows) for rows in (train, test))
    for chapter, name in CHAPTERS.items():
        print(f"{name:36}{in_train[chapter]:6} train {in_test[chapter]:4} test")
    print(f"{'all':36}{len(train):6} train {len(test):4} test")
    print(f"categories: {len(categories['train'])} train, {len(categories['test'])} test, 0 shared")
    share = max(in_test.values()) / len(test)
    print(f"always answering the commonest test chapter would score {share:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
