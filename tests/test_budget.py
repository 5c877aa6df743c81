"""The house keeps its measure: short files, short functions, a light front door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "cutlayer"
FILES = [path for path in sorted(SRC.rglob("*.py")) if not path.name.endswith("_pb2.py")]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80

HEAVY = ("torch", "transformers", "peft", "numpy", "grpc", "safetensors")


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how long a function is without its docstring, which may be as long as it must."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    return lines - (function.body[0].end_lineno - function.body[0].lineno + 1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_file_and_functions_are_short(path: Path):
    """No file has more than 400 lines, and no function more than 80 besides its docstring."""
    text = path.read_text()
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]

    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert [f.name for f in functions if lines_of(f) > MAX_FUNCTION_LINES] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_what_is_public_is_listed_once(path: Path):
    """`__all__` names each thing once, and only what the file defines or imports."""
    tree = ast.parse(path.read_text())
    lists = [
        [element.value for element in node.value.elts]
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]

    text = path.read_text()
    assert all(sorted(names) == sorted(set(names)) for names in lists)
    assert all(text.count(name) > 1 for names in lists for name in names)


@pytest.mark.parametrize(
    "code",
    [
        "import cutlayer",
        "import cutlayer.errors",
        "import cutlayer.cli.config",
        "from cutlayer.cli.main import main; main(['--help'])",
    ],
)
def test_front_door_is_light(code: str):
    """Importing the package, or asking for help, imports none of the heavy libraries."""
    lines = (
        "import sys",
        "try:",
        f"    {code}",
        "except SystemExit:",
        "    pass",
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])",
    )

    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "heavy: []"
