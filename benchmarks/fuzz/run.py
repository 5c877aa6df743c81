"""Can a stranger's bytes make the frame decoder do anything but refuse them?"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import ROOT, Result, environment, parser_of, plain_settings  # noqa: E402

CORPUS = HOME / "corpus"


def write_corpus() -> None:
    """Write honest streams for the fuzzer to begin with: each verb, with tensors and without."""
    import torch

    from cutlayer.wire import cutlayer_pb2 as pb
    from cutlayer.wire.frames import frames_of
    from cutlayer.wire.tensors import attach_tensors

    x = torch.arange(12, dtype=torch.float32).view(1, 3, 4)
    heads = {
        "forward": (
            pb.Head(sequence=1, forward=pb.Forward(keep_graph=True, seed=5)),
            {"smashed": x},
        ),
        "backward": (pb.Head(sequence=2, backward=pb.Backward(hold=1)), {"gradient": x}),
        "step": (pb.Head(sequence=3, optim_step=pb.OptimStep(step=1, optimizer="AdamW")), {}),
        "import": (pb.Head(import_adapter=pb.ImportAdapter()), {"a": x[0], "b": x.bool()}),
        "empty": (pb.Head(echo=pb.Echo()), {"payload": torch.empty(0)}),
        "ids": (pb.Head(forward=pb.Forward()), {"position_ids": torch.arange(4)[None]}),
        "attached": (pb.Head(attached=pb.Attached(reached=4, replies=[3, 4])), {}),
    }
    for name, (head, tensors) in heads.items():
        codecs = dict.fromkeys(tensors, "bf16" if name == "backward" else "int32")
        frames = list(frames_of(head, attach_tensors(head, tensors, codecs=codecs)))
        stream = b"".join(len(frame).to_bytes(2, "little") + frame for frame in frames)
        (CORPUS / name).write_bytes(stream)


def main() -> None:
    """Fuzz for a bounded number of executions."""
    parser = parser_of(__doc__)
    parser.add_argument("--executions", type=int, default=1_200_000)
    parser.add_argument("--write_corpus", action="store_true", help="write the seeds and stop")
    args = parser.parse_args()
    if args.write_corpus:
        return write_corpus()
    wanted = 5_000 if args.quick else args.executions
    with tempfile.TemporaryDirectory() as found:
        done = subprocess.run(
            [
                *(sys.executable, str(HOME / "target.py"), found, str(CORPUS)),
                *(f"-runs={wanted}", "-max_len=4096", "-seed=1", "-print_final_stats=1"),
                f"-artifact_prefix={found}/",
            ],
            cwd=ROOT,
            env=environment(1, passive=True),
            capture_output=True,
            text=True,
            check=False,
        )
    said = done.stdout + done.stderr
    count = re.search(r"number_of_executed_units:\s*(\d+)", said)
    if count is None:
        sys.exit(f"the fuzzer did not run: {said[-2000:]}")
    if done.returncode:
        print(said[-4000:], file=sys.stderr)
    covered = re.findall(r"cov: (\d+)", said)
    figures = {
        "executions": int(count[1]),
        "crashes": float(done.returncode != 0),
        "edges_covered": int(covered[-1]) if covered else 0,
    }
    settings = plain_settings(args, fuzzer="atheris", seeds=len(list(CORPUS.iterdir())))
    Result(figures, settings).write(args, HOME)
    if done.returncode:
        sys.exit(1)
    return None


if __name__ == "__main__":
    main()
