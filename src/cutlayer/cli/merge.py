"""`cutlayer merge`: write a run's adapter as one ordinary PEFT folder."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from cutlayer.cli.main import add_format, report
from cutlayer.errors import ConfigError, ModelError, StorageError

_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "README.md",
    "guarantee.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("--run", required=True, help="the run's output_dir, or a checkpoint in it")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Check that the adapter is whole, and copy what belongs to it.

    Raises:
        ModelError: If the run has no adapter, or only the client's half.
        ConfigError: If the output exists.
        StorageError: If it cannot be written; then nothing is left behind.
    """
    from cutlayer.client.checkpoint import PARTIAL_NOTE, read_adapter

    source, output = Path(args.run), Path(args.output)
    if output.exists():
        raise ConfigError(f"--output '{output}' exists already: name a new folder")
    if (source / PARTIAL_NOTE).exists():
        raise ModelError(
            f"'{source}' has the client's half only: this server keeps the trunk's half; use "
            "'cutlayer generate', or ask its operator"
        )
    state = read_adapter(source)
    aside = Path(tempfile.mkdtemp(prefix=".merge-", dir=_parent(output)))
    try:
        for name in _FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        aside.chmod(0o755)
        aside.rename(output)
    except OSError as error:
        raise StorageError(f"cannot write '{output}' ({error.strerror})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    numbers = sum(tensor.numel() for tensor in state.values())
    report(
        args.format,
        {"output": str(output), "tensors": len(state), "parameters": numbers},
        f"{output}: {len(state)} tensors, {numbers:,} parameters; load it with "
        f"PeftModel.from_pretrained(model, '{output}')",
    )
    return 0


def _parent(output: Path) -> Path:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write '{output.parent}' ({error.strerror})") from error
    return output.parent
