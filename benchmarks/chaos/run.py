"""Does a run that is killed a hundred times end as the calm one does?"""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    ROOT,
    Certificates,
    Result,
    environment,
    make_certificates,
    make_workload,
    median,
    parser_of,
    plain_settings,
    scratch,
)
from benchmarks.proxy import Proxy  # noqa: E402

PARTITION_S, FULL_S = 20.0, 3.0
STATE_MIB = 48


@dataclass
class Served:
    """`cutlayer serve`, started again at the same port when it is killed."""

    model: str
    certs: str
    state: Path
    port: int = 0
    process: Any = None

    def start(self) -> None:
        """Serve; return when it listens."""
        words = ["--model_name_or_path", self.model, "--split_bottom_layers=2"]
        words += ["--split_top_layers=2", "--host=127.0.0.1", f"--port={self.port}"]
        words += [f"--certs={self.certs}", "--mutual_tls", f"--state_dir={self.state}"]
        while True:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cutlayer.cli.main", "serve", *words, "--threads=1"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment(1, passive=True),
                cwd=ROOT,
            )
            for line in self.process.stdout:
                if found := re.search(r" at 127\.0\.0\.1:(\d+) ", line):
                    self.port = int(found[1])
                    return
            time.sleep(0.2)  # as systemd does: the disk may be full at this moment

    def kill(self) -> None:
        """End it without a warning, and start it again."""
        self.process.kill()
        self.process.wait()
        self.start()


@dataclass
class Trained:
    """The client's script, started again until it ends by itself."""

    spec: dict[str, Any]
    steps: list[tuple[int, float]] = field(default_factory=list)
    starts: int = 0
    finished: threading.Event = field(default_factory=threading.Event)
    process: Any = None

    def begin(self) -> None:
        """Run it in a thread, as a supervisor does."""
        threading.Thread(target=self._supervise, daemon=True).start()

    def _supervise(self) -> None:
        while True:
            self.starts += 1
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(HOME / "client.py"), json.dumps(self.spec)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment(1, passive=True),
                cwd=ROOT,
            )
            for line in self.process.stdout:
                with contextlib.suppress(ValueError):
                    told = json.loads(line)
                    if "step" in told:
                        self.steps.append((told["step"], told["at_s"]))
            if self.process.wait() == 0:
                self.finished.set()
                return

    @property
    def reached(self) -> int:
        """The greatest step that was done."""
        return max((step for step, _ in self.steps), default=0)

    def await_step(self, step: int) -> bool:
        """Wait until a step was done; say whether the run still goes on."""
        while self.reached < step and not self.finished.wait(0.01):
            pass
        return not self.finished.is_set()


@dataclass
class Chaos:
    """One disturbed run."""

    served: Served
    trained: Trained
    proxy: Proxy
    done: Counter[str] = field(default_factory=Counter)
    recoveries_s: list[float] = field(default_factory=list)

    def run(self, kinds: list[str], steps: int, rng: random.Random) -> None:
        """Disturb at random moments, spread over the whole run."""
        for number, kind in enumerate(kinds):
            if not self.trained.await_step(int(number * 0.97 * steps / len(kinds)) + 1):
                return
            time.sleep(rng.random() * 0.15)
            if self.trained.finished.is_set():
                return
            getattr(self, kind)()
            self.done[kind] += 1
            ended_s, seen = time.monotonic(), len(self.trained.steps)
            while len(self.trained.steps) == seen and not self.trained.finished.wait(0.005):
                pass
            if len(self.trained.steps) > seen:
                self.recoveries_s.append(max(self.trained.steps[seen][1] - ended_s, 0.0))

    def reset(self) -> None:
        """Reset every TCP connection."""
        self.proxy.cut()

    def server(self) -> None:
        """SIGKILL of the server; its start counts as recovery."""
        self.served.process.kill()
        threading.Thread(target=self.served.kill, daemon=True).start()

    def client(self) -> None:
        """SIGKILL of the client."""
        self.trained.process.kill()

    def both(self) -> None:
        """SIGKILL of both."""
        self.trained.process.kill()
        self.server()

    def partition(self) -> None:
        """No byte passes for a while, and nobody says so."""
        self.proxy.hold()
        time.sleep(PARTITION_S)
        self.proxy.release()

    def disk(self) -> None:
        """The server's disk is full for a while."""
        filler = self.served.state / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(FULL_S)
        filler.unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Any:
    """Make a folder a disk of a few MiB where we may; yield whether it is one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={STATE_MIB}m", "tmpfs", str(folder)]
    try:
        is_small = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        is_small = False
    try:
        yield is_small
    finally:
        if is_small:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def outcome(spec: dict[str, Any], state: Path) -> tuple[dict[str, Any], set[int]]:
    """Return the final adapter, and the steps that the optimizers of both sides count."""
    import torch
    from safetensors.torch import load_file

    out = Path(spec["out"])
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    here = torch.load(out / f"checkpoint-{spec['steps']}" / "optimizer.pt", weights_only=True)
    counted = {int(one["step"]) for one in here["state"].values()}
    folder = max(state.glob(f"client/chaos/step-{spec['steps']}~*"))
    there = load_file(folder / "optimizer.safetensors")
    counted |= {int(value) for name, value in there.items() if name.endswith("|step")}
    return adapter, counted


def trained(
    folder: Path, workload: Any, certs: Certificates, kinds: list[str], steps: int
) -> tuple[dict[str, Any], set[int], Chaos]:
    """Run once, disturbed as told, and return what came out."""
    folder.mkdir()
    with small_disk(folder / "state") as is_small:
        kinds = [kind for kind in kinds if is_small or kind != "disk"]
        served = Served(workload.model, certs.folder, folder / "state")
        served.start()
        proxy = Proxy(served.port)
        spec = {
            "model": workload.model,
            "tokens": workload.tokens,
            "server": f"127.0.0.1:{proxy.port}",
            "ca": certs.ca,
            "cert": certs.cert,
            "key": certs.key,
            "out": str(folder / "out"),
            "steps": steps,
        }
        chaos = Chaos(served, Trained(spec), proxy)
        chaos.trained.begin()
        try:
            chaos.run(kinds, steps, random.Random(7))
            chaos.trained.finished.wait()
            return *outcome(spec, folder / "state"), chaos
        finally:
            proxy.close()
            served.process.kill()
            served.process.wait()


def main() -> None:
    """Run calm, run in chaos, compare."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    quick = args.quick
    steps = 16 if quick else args.steps
    counts = {"reset": 52, "server": 24, "client": 22, "both": 6, "partition": 3, "disk": 4}
    if quick:
        counts = {"reset": 2, "server": 1, "client": 1}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    random.Random(3).shuffle(kinds)
    args.quick = True  # the model is the tiny one in either case
    import torch

    with scratch() as folder:
        workload = make_workload(args, folder, batches=8)
        args.quick = quick
        certs = make_certificates(folder / "certs")
        calm, _counted, _ = trained(folder / "calm", workload, certs, [], steps)
        rough, counted, chaos = trained(folder / "rough", workload, certs, kinds, steps)
        equal = calm.keys() == rough.keys() and all(torch.equal(calm[k], rough[k]) for k in calm)
    figures = {
        "kills": sum(chaos.done.values()),
        "steps_lost": max(steps - min(counted), 0),
        "steps_doubled": max(max(counted) - steps, 0),
        "adapter_bit_equal": float(equal),
        "recovery_median_s": median(chaos.recoveries_s),
        "recovery_worst_s": max(chaos.recoveries_s),
        "steps": steps,
        "client_starts": chaos.trained.starts,
    } | {f"kills_{kind}": chaos.done[kind] for kind in counts}
    recovery = "from the end of a partition or of a full disk; a process's start is part of it"
    settings = plain_settings(args, model=workload.name, partition_s=PARTITION_S, recovery=recovery)
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
