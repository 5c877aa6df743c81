"""What `cutlayer plan` reads and measures before it predicts: arguments, a config, this machine."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cutlayer.cli.plan import SHAPES
from cutlayer.errors import CannotCut, ModelError
from cutlayer.split.adapters import PARTS
from cutlayer.split.prediction import MOMENTS
from cutlayer.wire.codecs import CODECS, token_bytes
from cutlayer.wire.tensors import DTYPES

__all__ = ["bytes_of_token", "codecs", "faults", "machines", "pieces_of"]

_WEIGHTS = ("float32", "bfloat16", "float16")


def codecs() -> list[str]:
    """Return the codecs that activations and gradients may both have, the most exact first."""
    both = {"activations", "gradients"}
    return [name for name, codec in CODECS.items() if both <= codec.carries]


def bytes_of_token(codec: str, dtype: Any) -> Callable[[int], float]:
    """Return a function from a model's width to the bytes of one position on the wire."""
    return lambda width: token_bytes(codec, width, dtype)


def faults(args: argparse.Namespace) -> list[str]:
    """Return one sentence for each argument that makes no sense."""
    found = [
        f"--{name} {getattr(args, name)}: it must be at least {least}"
        for name, least in (
            ("batch_size", 1),
            ("max_length", 2),
            ("examples", 1),
            ("lora_r", 1),
            ("chunks", 0),
            ("show", 1),
        )
        if getattr(args, name) < least
    ]
    found += [
        f"--{name} {value}: it must be a number above 0"
        for name in ("epochs", "client_gflops", "server_gflops")
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf
    ]
    if args.chunks > args.batch_size >= 1:
        found.append(f"--chunks {args.chunks}: a batch has {args.batch_size} samples")
    if not 0 < args.supervised <= 1:
        found.append(f"--supervised {args.supervised}: it is a share above 0, at most 1")
    parts = args.train.split(",")
    if set(parts) - set(PARTS):
        found.append(f"--train {args.train}: name one or more of {', '.join(PARTS)}")
    if args.send_once and "bottom" in parts:
        found.append(
            "--send_once: a bottom that is trained changes what it sends; give --train trunk,top"
        )
    for name, known in (("optimizer", MOMENTS), ("dtype", _WEIGHTS)):
        if getattr(args, name) not in known:
            found.append(f"--{name} {getattr(args, name)}: one of {', '.join(known)}")
    if args.codec is not None and args.codec not in codecs():
        found.append(f"--codec {args.codec}: one of {', '.join(codecs())}")
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        found.append(f"--plot {args.plot}: its name must end in .svg or .png")
    return found


def pieces_of(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the model without memory, its pieces, and the LoRA.

    Raises:
        ModelError: If there is no such model.
        CannotCut: If it cannot be cut, or not be counted.
    """
    from peft import LoraConfig

    from cutlayer.split.cut import refuse_by_name
    from cutlayer.split.loading import skeleton_of
    from cutlayer.split.trace import trace

    config = _config(args.model)
    refuse_by_name(config)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < args.max_length:
        raise CannotCut(
            f"--max_length {args.max_length}: '{args.model}' has {longest} positions at most"
        )
    skeleton = skeleton_of(config, args.task)
    targets: Any = args.lora_target_modules
    targets = targets if targets == "all-linear" else targets.split(",")
    task = {"causal-lm": "CAUSAL_LM"}.get(args.task, "SEQ_CLS")
    lora = LoraConfig(
        r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules=targets, task_type=task
    )
    pieces = trace(skeleton, lora, columns=args.max_length, dtype=DTYPES[args.dtype])
    return skeleton, pieces, lora


def _config(name: str) -> Any:
    from transformers import AutoConfig, LlamaConfig

    if name in SHAPES:
        return LlamaConfig(
            vocab_size=128256,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            **SHAPES[name],
        )
    path = Path(name)
    if path.is_file() and path.name == "config.json":
        path = path.parent
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or path.suffix):
        raise ModelError(
            f"'{name}' is no folder and no config.json: name one, a hub id, or one of "
            f"{', '.join(SHAPES)}"
        )
    try:
        return AutoConfig.from_pretrained(path if path.is_dir() else name)
    except (OSError, ValueError, KeyError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(
            f"'{name}' has no config that can be read ({what}): name a folder with a config.json, "
            f"a hub id, or one of {', '.join(SHAPES)}"
        ) from error


def machines(args: argparse.Namespace, skeleton: Any, lora: Any) -> tuple[Any, Any, bool]:
    """Return the client's speed, the server's, and whether this machine was measured."""
    from cutlayer.split.calibration import measured_speed
    from cutlayer.split.prediction import Speed

    given = {
        side: Speed(gflops * 1e9, gflops * 1e9)
        for side in ("client", "server")
        if (gflops := getattr(args, f"{side}_gflops")) is not None
    }
    if len(given) == 2:
        return given["client"], given["server"], False
    tokens = min(256, args.max_length)
    here = measured_speed(skeleton, lora, tokens=tokens, dtype=DTYPES[args.dtype])
    return given.get("client", here), given.get("server", here), True
