"""How much memory does a client need, and what does one more tenant cost the server?"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    MIB,
    Certificates,
    Result,
    Workload,
    make_certificates,
    make_workload,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.processes import (  # noqa: E402
    Child,
    Server,
    memory_bytes,
    start_worker,
)

CUT: dict[str, Any] = {"bottom_layers": 2, "top_layers": 2}
LEAN: dict[str, Any] = {"lean_head": True, "train": ("trunk", "top")}
"""The head in tiles, and nothing kept of a bottom that is frozen."""
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""glibc gives each larger piece back to the system when it is freed."""


def used_by(worker: Child, steps: int) -> tuple[int, float]:
    """Return the most resident bytes of a process, and the CPU seconds of the last of its steps."""
    cpu_s = 0.0
    with worker:
        for _ in range(steps):
            cpu_s = float(worker.ask("step")["cpu_s"])
        return int(worker.ask("memory")["peak"]), cpu_s


def clients(
    workload: Workload, certificates: Certificates, server: Server, steps: int
) -> tuple[dict[str, int], dict[str, float], dict[str, int]]:
    """Return the peaks and CPU seconds of all contestants, and what a client's parts weigh."""

    def split(chunks: int = 1, **settings: Any) -> Child:
        settings |= {"port": server.port, "certificates": certificates, "chunks": chunks, **CUT}
        return start_worker("split", workload, **settings)

    used = {
        "imports": used_by(start_worker("imports", workload), 0),
        "loaded": used_by(start_worker("loaded", workload), 0),
        "client_loaded": used_by(split(), 0),
        "client": used_by(split(4), steps),
        "client_chunks_1": used_by(split(), steps),
        "client_lean": used_by(split(4, lean_head=True), steps),
        "client_lean_frozen": used_by(split(4, **LEAN), steps),
        "client_least": used_by(split(4, variables=NO_HOLES, **LEAN), steps),
        "unsplit_lora": used_by(start_worker("unsplit", workload), steps),
        "full_finetuning": used_by(start_worker("full", workload), steps),
    }
    with split() as client:
        client.ask("step")
        counted = {name: int(count) for name, count in client.ask("account").items()}
    peaks = {name: peak for name, (peak, _) in used.items()}
    return peaks, {name: cpu_s for name, (_, cpu_s) in used.items()}, counted


def tenants(
    workload: Workload, certificates: Certificates, server: Server, number: int, settle_s: float
) -> tuple[list[int], list[int], int]:
    """Let tenants come one by one, do a step each, and stay.

    Returns:
        The server's resident bytes after each tenant's step, the same while each tenant that
        has come also holds accumulated gradients, and the bytes of one tenant's adapter there.
    """
    stepped, holding, adapter = [], [], 0
    with ExitStack() as stack:
        for index in range(number):
            tenant = stack.enter_context(
                start_worker("split", workload, port=server.port, certificates=certificates, **CUT)
            )
            tenant.ask("step")
            stepped.append(memory_bytes(server.pid)["rss"])
            tenant.ask("backward_only")
            time.sleep(settle_s)
            holding.append(memory_bytes(server.pid)["rss"])
            adapter = int(tenant.ask("adapter_bytes")["bytes"])
            print(f"tenant {index + 1}: {holding[-1] / MIB:.1f} MiB", file=sys.stderr)
    return stepped, holding, adapter


def _slope(series: list[int]) -> float:
    return (series[-1] - series[0]) / (len(series) - 1)


def main() -> None:
    """Measure the clients, then the tenants, each process fresh."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contestant")
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument(
        "--settle", type=float, default=6.0, help="idle seconds before the server's memory is read"
    )
    args = parser.parse_args()
    settle_s = 0.0 if args.quick else args.settle
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        workload = make_workload(args, folder)
        settings = settings_of(
            workload, args, steps=args.steps, tenants=args.tenants, settle_s=settle_s
        )
        certificates = make_certificates(folder / "certs")
        with Server(workload, certificates, folder / "one") as server:
            peaks, cpu_s, counted = clients(workload, certificates, server, args.steps)
        with Server(workload, certificates, folder / "many") as server:
            idle = memory_bytes(server.pid)["rss"]
            stepped, holding, adapter = tenants(
                workload, certificates, server, args.tenants, settle_s
            )
            server_peak = memory_bytes(server.pid)["peak"]
    client = peaks["client"]
    own = peaks["imports"] + sum(counted.values())
    figures = {
        "client_over_own_weights_and_activations": client / own,
        "client_over_unsplit_lora": client / peaks["unsplit_lora"],
        "client_over_full_finetuning": client / peaks["full_finetuning"],
        "tenant_over_state": _slope(holding) / (4 * adapter),
        "client_lean_over_full_finetuning": peaks["client_lean"] / peaks["full_finetuning"],
        "client_lean_over_full_finetuning_without_imports": (
            (peaks["client_lean"] - peaks["imports"])
            / (peaks["full_finetuning"] - peaks["imports"])
        ),
        "client_least_over_full_finetuning": peaks["client_least"] / peaks["full_finetuning"],
        "client_least_over_full_finetuning_without_imports": (
            (peaks["client_least"] - peaks["imports"])
            / (peaks["full_finetuning"] - peaks["imports"])
        ),
        "client_least_cpu_ratio": cpu_s["client_least"] / cpu_s["client_lean_frozen"],
        "client_over_loaded_model": client / peaks["loaded"],
        "client_chunks_1_over_own_weights_and_activations": peaks["client_chunks_1"] / own,
        "client_chunks_1_over_own_weights_activations_and_logit_gradients": (
            peaks["client_chunks_1"] / (own + 2 * counted["logits"])
        ),
        "client_chunks_1_over_unsplit_lora": peaks["client_chunks_1"] / peaks["unsplit_lora"],
        "client_chunks_1_over_full_finetuning": (
            peaks["client_chunks_1"] / peaks["full_finetuning"]
        ),
        "tenant_between_steps_over_adapter_and_moments": _slope(stepped) / (3 * adapter),
        "tenant_adapter_mib": adapter / MIB,
        "tenant_mib": _slope(holding) / MIB,
        "server_idle_mib": idle / MIB,
        "server_peak_mib": server_peak / MIB,
    }
    figures |= {f"peak_{name}_mib": peak / MIB for name, peak in peaks.items()}
    figures |= {f"own_{name}_mib": count / MIB for name, count in counted.items()}
    settings |= {
        "own_weights_and_activations": "peak_imports + own_weights + own_training_state + "
        "own_activations + own_logits",
        "server_mib_by_tenant": [round(count / MIB, 1) for count in holding],
    }
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
