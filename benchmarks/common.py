"""What the benchmarks share: real text, certificates, a server, workers, and the result file.

A benchmark starts each contestant as a process of its own (`worker.py`) and a server as another
(`cutlayer serve`), all over TLS, and writes one JSON of figures. It asserts nothing.
"""

# Shapes:  K batches   B batch   T tokens

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".data" / "smollm2"
TEXT = ROOT / ".data" / "icd10" / "train.jsonl"
MIB = float(1 << 20)

_TINY_VOCABULARY = 256


@dataclass(frozen=True)
class Workload:
    """What every contestant trains: a model, batches of real text, a LoRA."""

    model: str
    """Folder of the weights."""
    tokens: str
    """File of token ids, (K, B, T), as safetensors."""
    rows: int
    columns: int
    width: int
    num_layers: int
    name: str
    rank: int = 8


@dataclass(frozen=True)
class Certificates:
    """Files for mutual TLS between two processes of this machine."""

    folder: str
    """What a server is given."""
    ca: str
    cert: str
    key: str


# ---------------------------------------------------------------------- the command line


def parser_of(question: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny random model and few steps: says that the benchmark runs, and nothing else",
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of real weights")
    parser.add_argument("--text", type=Path, default=TEXT, help="JSON lines of real text")
    parser.add_argument(
        "--output",
        type=Path,
        help="where the JSON goes; results/MACHINE-COMMIT.json beside run.py by default, "
        "and with --quick nowhere",
    )
    return parser


# ---------------------------------------------------------------------- what is trained


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cutlayer-benchmark-") as made:
        yield Path(made)


def make_workload(
    args: argparse.Namespace, folder: Path, *, rows: int = 4, columns: int = 256, batches: int = 4
) -> Workload:
    """Lay out weights and batches; with `--quick`, a tiny model of random weights.

    Every position of every batch is real text: samples are joined, never padded.
    """
    import torch
    from safetensors.torch import save_file

    if args.quick:
        rows, columns = 4, 16
        model, name = _tiny_model(folder / "model"), "tiny random Llama"
        ids = list((ROOT / "LICENSE").read_bytes())
    else:
        if not (args.model / "config.json").is_file() or not args.text.is_file():
            sys.exit(
                f"'{args.model}' or '{args.text}' is missing: run 'make demo' once, which fetches "
                "both, or use --quick"
            )
        model, name = args.model, args.model.name
        ids = _ids_of(args.model, args.text, rows * columns * batches)
    wanted = rows * columns * batches
    ids = (ids * (wanted // len(ids) + 1))[:wanted]
    tokens = torch.tensor(ids).view(batches, rows, columns)
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    config = json.loads((model / "config.json").read_text())
    return Workload(
        model=str(model),
        tokens=str(folder / "tokens.safetensors"),
        rows=rows,
        columns=columns,
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        name=name,
    )


def _ids_of(model: Path, text: Path, wanted: int) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for line in text.read_text().splitlines():
        sample = json.loads(line)
        turns = [turn["content"] for turn in (*sample["prompt"], *sample["completion"])]
        ids += tokenizer("\n".join(turns) + tokenizer.eos_token)["input_ids"]
        if len(ids) >= wanted:
            break
    return ids


def _tiny_model(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------- certificates


def make_certificates(folder: Path) -> Certificates:
    """Have `cutlayer certs init` make an authority and the certificates of both sides."""
    subprocess.run(
        [sys.executable, "-m", "cutlayer.cli.main", "certs", "init", "--dir", str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=_environment(1, passive=False),
    )
    return Certificates(
        folder=str(folder),
        ca=str(folder / "ca.pem"),
        cert=str(folder / "client.pem"),
        key=str(folder / "client.key"),
    )


# ---------------------------------------------------------------------- processes


def _environment(threads: int, *, passive: bool) -> dict[str, str]:
    # Processes that share cores must not spin on each other's time; one that runs alone may.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if passive else {}
    return {
        **os.environ,
        **waiting,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Child:
    """A process of ours that answers one JSON line for each that it is sent."""

    def __init__(
        self, module: str, spec: Mapping[str, Any], *, threads: int, passive: bool = False
    ) -> None:
        self.spec = dict(spec)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(threads, passive=passive),
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
    ) -> None:
        """Start it and wait until it listens."""
        flags = {
            "--model_name_or_path": workload.model,
            "--split_bottom_layers": bottom_layers,
            "--split_top_layers": top_layers,
            "--certs": certificates.folder,
            "--state_dir": folder / "state",
            "--host": "127.0.0.1",
            "--port": 0,
            "--threads": threads,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cutlayer.cli.main", "serve", "--mutual_tls", *words],
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(threads, passive=passive),
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
    **settings: Any,
) -> Child:
    """Start a contestant; a split one is told a port and more `settings`."""
    spec = {
        "role": role,
        "workload": asdict(workload),
        "server": f"127.0.0.1:{port}",
        "certificates": asdict(certificates) if certificates else {},
        "threads": threads,
        **settings,
    }
    return Child("benchmarks.worker", spec, threads=threads, passive=passive)


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


# ---------------------------------------------------------------------- results


@dataclass
class Result:
    """The figures of one run, and how they were taken."""

    figures: dict[str, float]
    settings: dict[str, Any]
    machine: str = field(default_factory=lambda: machine())
    commit: str = field(default_factory=lambda: commit())
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    def write(self, args: argparse.Namespace, home: Path) -> None:
        """Print the figures, and write them where `--output` says."""
        for name, value in self.figures.items():
            print(f"{name:48s} {value:.5g}")
        path: Path | None = args.output
        if path is None and not args.quick:
            path = home / "results" / f"{self.machine}-{self.commit}.json"
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")
            print(f"written to {path}")


def machine() -> str:
    """Return the CPU's model and the number of cores as one plain word."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        model = found.group(1) if found else model
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {os.cpu_count()} cores".lower()).strip("-")


def commit() -> str:
    """Return git's short hash of this checkout, `unknown` outside of one."""
    return _git("rev-parse", "--short", "HEAD") or "unknown"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def settings_of(workload: Workload, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the settings that every benchmark records, and its own."""
    from importlib.metadata import version

    return {
        "model": workload.name,
        "batch": [workload.rows, workload.columns],
        "width": workload.width,
        "layers": workload.num_layers,
        "lora": {"rank": workload.rank, "target_modules": "all-linear"},
        "dtype": "float32",
        "optimizer": "AdamW",
        "tls": "mutual",
        "quick": args.quick,
        "uncommitted_changes_in_src": bool(_git("status", "--porcelain", "--", "src")),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio")},
        **more,
    }


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))
