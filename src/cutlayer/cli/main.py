"""The front door: `cutlayer VERB`. One file a verb; heavy imports wait."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from cutlayer.errors import CutlayerError

__all__ = ["main"]

# Verb -> what it does. The module of the same name has `arguments(parser)` and `run(args)`.
VERBS = {
    "certs": "make the certificates with which client and server trust each other",
    "serve": "hold the trunk of a model and train tenants' adapters on it",
    "sessions": "list, show and stop the runs that this server knows",
    "checkpoints": "list and delete what this server keeps of runs",
    "status": "tell what this server does",
    "audit-log": "check that nobody changed a server's audit log",
    "tenants": "add, list, rotate and revoke those who may use this server",
    "preview": "show what a run would train on, send and need; nothing is sent",
    "plan": "predict memory, bytes and time of every cut of a model, and recommend one",
    "doctor": "check server, certificates, versions, weights, cut and link before a run",
    "train": "fine-tune through the split",
    "audit": "measure what the server can read of one's own data; nothing is sent",
    "merge": "write a run's adapter as one ordinary PEFT folder",
    "generate": "generate text through the split",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return its exit code, which is that of the error's class (errors.py)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in argv if not word.startswith("-")), None)
    parser = _parser(verb)
    args, rest = parser.parse_known_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"cutlayer {version('cutlayer')}")
        return 0
    if args.verb is None:
        parser.print_help()
        return 0
    args.overrides = _overrides(rest, parser, allowed=hasattr(args, "config"))
    # Nothing is sent to a model hub's telemetry by a tool whose point is what leaves the building.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # What gRPC would log we say ourselves, in one sentence.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        return int(importlib.import_module(_module(args.verb)).run(args) or 0)
    except CutlayerError as error:
        return _tell(error, getattr(args, "format", "text"))
    except ModuleNotFoundError as error:
        return _tell(_missing_extra(error, args.verb), getattr(args, "format", "text"))
    except Exception as error:
        if os.environ.get("CUTLAYER_TRACEBACK"):
            raise
        return _tell(_unexpected(error), getattr(args, "format", "text"))
    except KeyboardInterrupt:
        print(f"cutlayer {args.verb}: interrupted", file=sys.stderr)
        return 130


def _module(verb: str) -> str:
    return f"cutlayer.cli.{verb.replace('-', '_')}"


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cutlayer", description="Split-learning fine-tuning of Hugging Face models."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, text in VERBS.items():
        child = verbs.add_parser(name, help=text, description=text.capitalize() + ".")
        if name == verb:
            importlib.import_module(_module(name)).arguments(child)
    return parser


def _overrides(
    rest: Sequence[str], parser: argparse.ArgumentParser, *, allowed: bool
) -> dict[str, str]:
    """Read `--key value` and `--key=value` pairs that override the YAML file."""
    if rest and not allowed:
        parser.error(f"unknown argument {rest[0]}: see 'cutlayer VERB --help'")
    found: dict[str, str] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            parser.error(f"'{word}' stands alone: write --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or (words[0].startswith("--")):
                parser.error(f"--{key} has no value: write --{key} value")
            value = words.pop(0)
        found[key] = value
    return found


def _missing_extra(error: ModuleNotFoundError, verb: str) -> CutlayerError:
    from cutlayer.errors import ConfigError

    extra = {"serve": "server", "tenants": "server", "audit": "train,audit,dp"}.get(verb, "train")
    if error.name == "matplotlib":
        extra = "plot"
    if error.name in ("scipy", "dp_accounting", "opacus"):
        extra = "dp" if verb != "audit" else extra
    return ConfigError(
        f"'cutlayer {verb}' needs the package '{error.name}', which is not installed: run "
        f"pip install 'cutlayer[{extra}]'"
    )


def _unexpected(error: Exception) -> CutlayerError:
    """Say in one sentence what nobody foresaw, or that a disk is full."""
    from cutlayer.errors import StorageError

    what = (str(error).strip().splitlines() or [""])[0][:300]
    # torch writes optimizer states with an error of its own kind.
    if isinstance(error, OSError) or "PytorchStreamWriter" in what:
        return StorageError(
            f"a file could not be read or written ({what}): free space, or name another folder; "
            "what was complete before is untouched"
        )
    return CutlayerError(
        f"{type(error).__name__}: {what}; set CUTLAYER_TRACEBACK=1 to see where, and report it"
    )


def _tell(error: CutlayerError, form: str) -> int:
    if form == "json":
        print(json.dumps({"error": {"code": error.code, "message": str(error)}}))
    print(f"cutlayer: {error}", file=sys.stderr)
    return error.exit_code


def report(form: str, facts: dict[str, Any], text: str) -> None:
    """Print a verb's result as JSON or as text."""
    print(json.dumps(facts, indent=2, default=str) if form == "json" else text)


def settle(threads: int | None = None) -> None:
    """Make the libraries speak of errors only, and compute with so many threads.

    Raises:
        ConfigError: If there cannot be so many.
    """
    import warnings

    from cutlayer.errors import ConfigError

    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: it must be at least 1")
    import torch
    import transformers

    if threads:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add `--format`, which every verb that reports has."""
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how to report (default: text)"
    )


if __name__ == "__main__":
    sys.exit(main())
