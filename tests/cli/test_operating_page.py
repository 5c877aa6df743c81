"""The operator's page: its commands, as they stand there, bring two tenants to train."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_by_hand import saved_tiny, write_rows, write_run
from tests.tokens import dataset

PAGE = Path(__file__).parent.parent.parent / "docs" / "operating.md"


def commands() -> list[str]:
    """Return the commands of the page's first block."""
    block = re.search(r"```\n(.*?)```", PAGE.read_text(), re.S)[1]
    return block.splitlines()


def test_ten_commands_are_enough():
    """From nothing to two tenants that train takes ten commands, each of them ours or pip's."""
    assert len(commands()) <= 10
    assert {shlex.split(line)[0] for line in commands()} == {"pip", "cutlayer"}


@pytest.mark.slow
def test_the_commands_of_the_page_work(folder_of: Any, tmp_path: Path):
    """Run in their order, pip's left out, they end with a status that names both tenants."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    write_rows(tmp_path, [{"text": text} for text in dataset(16)["text"]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layers = {"split_bottom_layers": 2, "split_top_layers": 2, "split_cert": None}
    write_run(tmp_path, model, port, split_key=None, **layers)
    server = None
    try:
        for line in commands():
            words = shlex.split(line.replace("MODEL", str(model)).replace("gpu.example.org", "h"))
            if words[0] == "pip":
                continue
            call = [sys.executable, "-m", "cutlayer.cli.main", *words[1:]]
            if words[-1] == "&":
                call = [*call[:-1], "--port", str(port), "--host", "127.0.0.1"]
                call[call.index("--metrics_port") + 1] = "0"
                server = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
                while "serving layers" not in server.stdout.readline():
                    pass
                continue
            call += ["--format", "json"] if words[1] == "status" else []
            done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (line, done.stderr)
        status = json.loads(done.stdout)
    finally:
        if server is not None:
            server.terminate()
            server.wait(timeout=60)

    assert [(tenant["name"], tenant["steps"]) for tenant in status["tenants"]] == [
        ("ward-a", 3),
        ("ward-b", 3),
    ]
    for out in ("out-a", "out-b"):
        assert (tmp_path / out / "adapter_model.safetensors").is_file()
    assert time.time() - status["started_s"] < 600
    assert os.getpid() != status["pid"]
