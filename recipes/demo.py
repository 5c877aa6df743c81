#!/usr/bin/env python3
"""The story of a hospital, on this machine: `make demo`.

A hospital keeps its diagnosis wordings on its own machine, which has no GPU. It fine-tunes a real
model (SmolLM2-135M-Instruct) to put a wording into its ICD-10-CM chapter; the model's trunk runs in
another process, over TLS. Then the adapter is loaded into the ordinary unsplit model with stock
peft, and both ways of running it are compared. At the end stands what the server could have read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

warnings.filterwarnings("ignore", category=FutureWarning)

HERE = Path(__file__).parent
SHOWN = 3


def main(argv: list[str] | None = None) -> int:
    """Run the whole story; return 0 if split and merged evaluation agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=".data", help="weights and text of the prepare scripts")
    parser.add_argument("--output", default="out/demo", help="made anew each time")
    parser.add_argument("--rows", type=int, default=200, help="held-out codes to score")
    args = parser.parse_args(argv)
    data, output = Path(args.data), Path(args.output)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    rows = [json.loads(line) for line in (data / "icd10/test.jsonl").open()][: args.rows]
    started_s = time.monotonic()

    say("1. Certificates, and a server that holds layers 2:28 of 30 (its own process, TLS)")
    cli("certs", "init", "--dir", str(output / "certs"))
    server, address = serve(data / "smollm2", output)
    try:
        say("2. The untrained model on held-out codes")
        before, answers_before = score(data / "smollm2", None, rows)
        print(f"accuracy before: {before:.1%} of {len(rows)}")

        say("3. Training through the split; both ends and the tokenizer stay here")
        overrides = overrides_of(data, output, address)
        cli("train", "--config", str(HERE / "icd10.yaml"), "--threads", "1", *overrides)

        say("4. The two halves become one ordinary PEFT folder")
        cli("merge", "--run", str(output / "run"), "--output", str(output / "adapter"))

        say("5. That folder in the ordinary unsplit model, with stock peft")
        after, answers_after = score(data / "smollm2", output / "adapter", rows)

        say("6. The same adapter through the split")
        through, answers_through = score_split(data, output, address, rows)
    finally:
        server.terminate()
        server.wait()
    say("7. What the server could read of this run (the report is audit.html)")
    audit_words = ["--run", str(output / "run"), "--output", str(output / "audit")]
    cli("audit", *audit_words, "--samples", "8", "--tokens", "12", "--threads", "2")
    agree = answers_after == answers_through
    for row, was, now in list(zip(rows, answers_before, answers_after, strict=True))[:SHOWN]:
        print(f"\n  {row['prompt'][-1]['content']}\n    right:  {row['completion'][0]['content']}")
        print(f"    before: {was}\n    after:  {now}")
    print(f"\naccuracy on {len(rows)} held-out codes: before {before:.1%}, after {after:.1%}")
    print(
        f"split and merged evaluation: {through:.1%} and {after:.1%}, "
        + ("all answers agree" if agree else "ANSWERS DIFFER")
    )
    print(f"done in {time.monotonic() - started_s:.0f} s; the adapter is in {output / 'adapter'}")
    return 0 if agree and after > before else 1


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def cli(*words: str) -> None:
    """Run a cutlayer verb as a user would."""
    subprocess.run([sys.executable, "-m", "cutlayer.cli.main", *words], check=True)


def serve(model: Path, output: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port; return it and its address."""
    words = ["--split_bottom_layers", "2", "--split_top_layers", "2", "--host", "127.0.0.1"]
    words += ["--port", "0", "--threads", "1", "--mutual_tls", "--model_name_or_path", str(model)]
    words += ["--certs", str(output / "certs"), "--state_dir", str(output / "state")]
    log = (output / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "cutlayer.cli.main", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert server.stdout
    line = server.stdout.readline().strip()
    if " at " not in line:
        sys.exit(f"the server did not start: see {output / 'server.log'}")
    print(line)
    return server, "localhost:" + line.split(" over ")[0].rpartition(":")[2]


def split_settings(output: Path, address: str) -> dict[str, Any]:
    """Return where the server is and who we are."""
    certs = output / "certs"
    return {
        "server": address,
        "bottom_layers": 2,
        "top_layers": 2,
        "ca": str(certs / "ca.pem"),
        "cert": str(certs / "client.pem"),
        "key": str(certs / "client.key"),
    }


def overrides_of(data: Path, output: Path, address: str) -> list[str]:
    """Return the flags that complete recipes/icd10.yaml."""
    flags = {f"split_{k}": v for k, v in split_settings(output, address).items()}
    flags |= {
        "model_name_or_path": data / "smollm2",
        "dataset_name": data / "icd10",
        "output_dir": output / "run",
        "split_chunks": 4,  # both processes compute at once
        "split_transcript": 16,
    }
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def score(model: Path, adapter: Path | None, rows: list[Any]) -> tuple[float, list[str]]:
    """Score the ordinary unsplit model, with stock peft if there is an adapter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    sys.path.insert(0, str(HERE))
    from score_icd10 import accuracy

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        whole = PeftModel.from_pretrained(whole, adapter)
    return accuracy(whole, AutoTokenizer.from_pretrained(model), rows)


def score_split(data: Path, output: Path, address: str, rows: list[Any]) -> tuple[float, list[str]]:
    """Score through the split, a KV cache on each side."""
    from peft import LoraConfig
    from score_icd10 import accuracy
    from transformers import AutoTokenizer

    import cutlayer

    model = cutlayer.connect(
        str(data / "smollm2"),
        peft_config=LoraConfig.from_pretrained(output / "adapter"),
        **split_settings(output, address),
    )
    with model:
        model.take_up(output / "adapter")
        return accuracy(model, AutoTokenizer.from_pretrained(data / "smollm2"), rows)


if __name__ == "__main__":
    sys.exit(main())
