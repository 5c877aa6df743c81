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
from collections.abc import Iterator, Sequence
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


def environment(
    threads: int, *, passive: bool = False, packages: Path | None = None
) -> dict[str, str]:
    """Return the environment of a process; `packages` is a folder of more that it may import."""
    # Processes that share cores must not spin on each other's time; one that runs alone may.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if passive else {}
    more = [str(packages)] if packages else []
    return {
        **os.environ,
        **waiting,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", ""), *more]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# ---------------------------------------------------------------------- certificates


def make_certificates(folder: Path) -> Certificates:
    """Have `cutlayer certs init` make an authority and the certificates of both sides."""
    subprocess.run(
        [sys.executable, "-m", "cutlayer.cli.main", "certs", "init", "--dir", str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment(1, passive=False),
    )
    return Certificates(
        folder=str(folder),
        ca=str(folder / "ca.pem"),
        cert=str(folder / "client.pem"),
        key=str(folder / "client.key"),
    )


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


def plain_settings(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return what a benchmark without a model records."""
    return {
        "quick": args.quick,
        "allocator": Path(os.environ.get("LD_PRELOAD", "libc")).name,
        "uncommitted_changes_in_src": bool(_git("status", "--porcelain", "--", "src")),
        **more,
    }


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
        "allocator": Path(os.environ.get("LD_PRELOAD", "libc")).name,
        "uncommitted_changes_in_src": bool(_git("status", "--porcelain", "--", "src")),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio")},
        **more,
    }


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))
