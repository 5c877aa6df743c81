"""The processes of a benchmark: contestants and servers, and what they use."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Certificates, Workload, environment


class Child:
    """A process of ours that answers one JSON line for each that it is sent."""

    def __init__(
        self,
        module: str,
        spec: Mapping[str, Any],
        *,
        threads: int,
        passive: bool = False,
        cores: Sequence[int] = (),
        packages: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.spec = dict(spec)
        self._process = subprocess.Popen(
            [*_on(cores), sys.executable, "-m", module, json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads, passive=passive, packages=packages) | dict(variables or {}),
            cwd=ROOT,
        )
        self.hello: dict[str, Any] = self._read()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """Have it do something and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a contestant died (exit code {self._process.wait()}): {self.spec}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Server:
    """`cutlayer serve` as a process of its own, over mutual TLS."""

    def __init__(
        self,
        workload: Workload,
        certificates: Certificates,
        folder: Path,
        *,
        bottom_layers: int = 2,
        top_layers: int = 2,
        threads: int = 1,
        passive: bool = False,
        cores: Sequence[int] = (),
        packages: Path | None = None,
        **more: Any,
    ) -> None:
        """Start it, with more flags of `cutlayer serve`, and wait until it listens."""
        flags = {
            "--model_name_or_path": workload.model,
            "--split_bottom_layers": bottom_layers,
            "--split_top_layers": top_layers,
            "--certs": certificates.folder,
            "--state_dir": folder / "state",
            "--host": "127.0.0.1",
            "--port": 0,
            "--threads": threads,
            **{f"--{name}": value for name, value in more.items()},
        }
        serve = ("serve", "--mutual_tls")
        words = [
            str(word)
            for name, value in flags.items()
            for word in ((name,) if value is True else (name, value))
        ]
        self._process = subprocess.Popen(
            [*_on(cores), sys.executable, "-m", "cutlayer.cli.main", *serve, *words],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads, passive=passive, packages=packages),
            cwd=ROOT,
        )
        self.port = self._port()

    def _port(self) -> int:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = re.search(r"^serving layers .* at 127\.0\.0\.1:(\d+) ", line)
            if found:
                return int(found.group(1))
        sys.exit(f"the server did not start (exit code {self._process.wait()})")

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def close(self) -> None:
        """Stop it as an operator would."""
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def start_worker(
    role: str,
    workload: Workload,
    *,
    port: int = 0,
    certificates: Certificates | None = None,
    threads: int = 1,
    passive: bool = False,
    cores: Sequence[int] = (),
    variables: Mapping[str, str] | None = None,
    **settings: Any,
) -> Child:
    """Start a contestant; a split one is told a port and more `settings`.

    `variables` are added to its environment.
    """
    spec = {
        "role": role,
        "workload": asdict(workload),
        "server": f"127.0.0.1:{port}",
        "certificates": asdict(certificates) if certificates else {},
        "threads": threads,
        **settings,
    }
    return Child(
        "benchmarks.worker",
        spec,
        threads=threads,
        passive=passive,
        cores=cores,
        variables=variables,
    )


def _on(cores: Sequence[int]) -> list[str]:
    """Return the words before a command that is to stay on these cores; none for anywhere."""
    return ["taskset", "-c", ",".join(map(str, cores))] if cores else []


def cpu_seconds(pid: int | str = "self") -> float:
    """Return the CPU seconds that a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int | str = "self") -> dict[str, int]:
    """Return a process's resident bytes now (`rss`) and at most so far (`peak`)."""
    status = Path(f"/proc/{pid}/status").read_text()

    def of(field_name: str) -> int:
        found = re.search(rf"^{field_name}:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found.group(1)) * 1024

    return {"rss": of("VmRSS"), "peak": of("VmHWM")}
