"""What the documents say of tests is so: each one named exists, and states what it is named for."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"`(tests/[\w/.]*)(?:::(\w+))?`")
ACCEPTANCE = [
    "A1",
    "A1b",
    "A1c",
    "A2",
    "A2n",
    "A4",
    "A4c",
    "A5",
    "A6",
    "A7",
    "D1",
    "D3a",
    "D4",
    "D5",
    "D7",
    "D8",
    "neg",
]


@functools.cache
def docstrings_of(path: Path) -> dict[str, str]:
    """Return each test function of a file with its docstring."""
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("document", DOCS)
def test_every_test_that_is_named_exists(document: str):
    """A path under tests/ is there, and a function named after it is in that file."""
    for path, function in NAMED.findall((ROOT / document).read_text()):
        assert (ROOT / path).exists(), path
        assert not function or function in docstrings_of(ROOT / path), f"{path}::{function}"


def rows_of(document: str, start: str) -> list[str]:
    """Return the lines of tables that begin with a word."""
    lines = (ROOT / document).read_text().splitlines()
    return [line for line in lines if line.startswith(f"| {start}")]


@pytest.mark.parametrize("name", ACCEPTANCE)
def test_every_acceptance_test_is_listed_with_the_tests_that_state_it(name: str):
    """docs/privacy.md has one row for it, whose tests' docstrings begin with its id."""
    (row,) = rows_of("docs/privacy.md", f"T-{name} ")
    tests = NAMED.findall(row)

    assert tests
    for path, function in tests:
        assert docstrings_of(ROOT / path)[function].startswith(f"T-{name}: ")


def test_every_promise_names_its_test():
    """Each row of the threat model's table of promises ends in a test."""
    table = (ROOT / "docs/threat-model.md").read_text().split("| promise | test |")[1]
    rows = table.split("\n\n")[0].strip().splitlines()[1:]

    assert len(rows) > 15
    assert [row for row in rows if not NAMED.search(row.rpartition(" | ")[2])] == []


def test_the_report_of_the_demo_is_whole_and_small():
    """docs/report has it as one file that loads nothing, and as a picture of less than 400 kB."""
    page = (ROOT / "docs/report/demo-report.html").read_text()
    picture = (ROOT / "docs/report/demo-report.png").read_bytes()

    assert "default-src 'none'" in page
    assert "smollm2" in page
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 400_000
