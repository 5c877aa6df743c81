"""`cutlayer preview`: what a run would train on, send and need. Nothing is sent."""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from typing import Any

from cutlayer.cli.config import Run, connect_settings, read_run
from cutlayer.cli.main import add_format, report, settle
from cutlayer.errors import ConfigError

IGNORED = -100


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("--config", required=True, help="the run's YAML; --key value overrides")
    parser.add_argument("--samples", type=int, default=2, help="samples to show (default: 2)")
    parser.add_argument(
        "--bandwidth_mbit", type=float, default=100.0, help="of the link (default: 100)"
    )
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Tokenize as the trainer will, and count.

    Raises:
        ConfigError: If an argument or the run makes no sense.
    """
    if args.samples < 0 or not 0 < args.bandwidth_mbit < math.inf:
        raise ConfigError(
            f"--samples {args.samples} must be at least 0 and --bandwidth_mbit "
            f"{args.bandwidth_mbit:g} a number above 0"
        )
    settings = read_run(args.config, args.overrides)
    samples, rows = _tokenized(settings, args.samples)
    facts = _facts(settings, rows, args.bandwidth_mbit)
    shown = [_shown(sample) for sample in samples]
    report(args.format, {"samples": shown, **facts}, _text(shown, facts))
    return 0


def _tokenized(
    settings: Run, show: int
) -> tuple[list[list[tuple[str, bool]]], list[dict[str, Any]]]:
    """Return the first samples as (token, carries loss) pairs, and the tokenized rows."""
    from datasets.utils.logging import disable_progress_bar

    from cutlayer.cli.data import load_split, load_tokenizer

    settle()
    disable_progress_bar()
    tokenizer = load_tokenizer(settings)
    data = load_split(settings, settings.data.dataset_train_split)
    if settings.split.task == "causal-lm":
        rows = list(prepared(settings, data, tokenizer))
    else:
        rows = [_encoded(settings, tokenizer, row["text"]) for row in data]
    samples = [
        [
            (tokenizer.decode([token]), label != IGNORED)
            for token, label in zip(row["input_ids"], _labels(row), strict=True)
        ]
        for row in rows[:show]
    ]
    return samples, rows


def prepared(settings: Run, data: Any, tokenizer: Any) -> Any:
    """Have TRL's trainer itself prepare the data, around a model of a few kilobytes."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTTrainer

    from cutlayer.cli.data import check_supervised, in_the_trainers_words

    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with tempfile.TemporaryDirectory() as folder, in_the_trainers_words():
        args = copy.copy(settings.sft)
        args.output_dir = folder
        trainer = SFTTrainer(
            model=LlamaForCausalLM(small), args=args, train_dataset=data, processing_class=tokenizer
        )
    check_supervised(trainer.train_dataset, of=len(data), packed=args.packing)
    return trainer.train_dataset


def _encoded(settings: Run, tokenizer: Any, text: str) -> dict[str, Any]:
    ids = tokenizer(text, truncation=True, max_length=settings.sft.max_length)["input_ids"]
    return {"input_ids": ids, "labels": [IGNORED] * len(ids)}


def _labels(row: dict[str, Any]) -> list[int]:
    labels: list[int] = row.get("labels") or row["input_ids"]
    return labels


def _facts(settings: Run, rows: list[dict[str, Any]], bandwidth_mbit: float) -> dict[str, Any]:
    import torch
    from peft import LoraConfig

    from cutlayer.cli.data import check_lengths
    from cutlayer.split.adapters import plan_adapter
    from cutlayer.split.cut import Cut
    from cutlayer.split.footprint import footprint
    from cutlayer.split.loading import open_checkpoint, skeleton_of
    from cutlayer.wire.codecs import codecs_of, token_bytes
    from cutlayer.wire.tensors import DTYPES

    given = connect_settings(settings)
    checkpoint = open_checkpoint(given["model"], revision=given["revision"])
    check_lengths(settings, checkpoint.config)
    skeleton = skeleton_of(checkpoint.config, given["task"])
    cut = Cut.leaving(
        bottom_layers=given["bottom_layers"],
        top_layers=given["top_layers"],
        num_layers=skeleton.anatomy.num_layers,
    )
    lora = given["peft_config"] or LoraConfig()
    plan = plan_adapter(skeleton, lora, cut, train=given["train"])
    sft = settings.sft
    lengths = sorted(len(row["input_ids"]) for row in rows)
    batch = sft.per_device_train_batch_size * sft.gradient_accumulation_steps
    # A batch is padded to its longest sample, which lies near the upper end of the lengths.
    longest = lengths[int(0.95 * (len(lengths) - 1))]
    dtype = DTYPES[given["dtype"]]
    width = checkpoint.config.get_text_config().hidden_size
    cost = footprint(
        skeleton,
        plan,
        cut,
        tokens=batch * longest,
        dtype=dtype,
        wire_bytes={
            departure: token_bytes(name, width, dtype)
            for departure, name in codecs_of(given["codec"]).items()
        },
    )
    steps = sft.max_steps
    if steps <= 0:
        steps = math.ceil(len(rows) * sft.num_train_epochs / batch)
    in_first = min(math.ceil(len(rows) / batch), steps) if given["send_once"] else steps
    saved_bytes = cost.activations_up_bytes if given["send_once"] else 0
    client_s = cost.client_flops / _flops_per_s(torch)
    bits_per_s = bandwidth_mbit * 1e6
    link_s = (cost.up_bytes + cost.down_bytes) * 8 / bits_per_s
    saved_s = (steps - in_first) * saved_bytes * 8 / bits_per_s
    return {
        "rows": len(rows),
        "tokens_median": lengths[len(lengths) // 2],
        "tokens_max": lengths[-1],
        "supervised_tokens": sum(sum(x != IGNORED for x in _labels(row)) for row in rows),
        "cut": str(cut),
        "num_layers": skeleton.anatomy.num_layers,
        "steps": steps,
        "up_bytes_per_step": cost.up_bytes,
        "up_bytes_per_later_step": cost.up_bytes - saved_bytes,
        "down_bytes_per_step": cost.down_bytes,
        "client_weight_bytes": cost.client_weight_bytes,
        "client_state_bytes": cost.client_state_bytes,
        "trunk_weight_bytes": cost.trunk_weight_bytes,
        "trunk_state_bytes": cost.trunk_state_bytes,
        "client_s_per_step": client_s,
        "link_s_per_step": link_s,
        "eta_s_without_trunk": steps * (client_s + link_s) - saved_s,
        "trunk_flops_per_step": cost.trunk_flops,
    }


def _flops_per_s(torch: Any) -> float:
    """Return what this machine does in a matrix product of a transformer's shape."""
    a, b = torch.randn(256, 1024), torch.randn(1024, 1024)
    a @ b
    started_s = time.perf_counter()
    for _ in range(5):
        a @ b
    return float(5 * 2 * 256 * 1024 * 1024 / (time.perf_counter() - started_s))


def _shown(sample: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    return [{"token": token, "loss": carries} for token, carries in sample]


def _text(shown: list[list[dict[str, Any]]], facts: dict[str, Any]) -> str:
    from cutlayer.cli.progress import human_bytes

    lines = ["Tokens; what stands in [brackets] carries loss:", ""]
    lines += [
        "".join(f"[{t['token']}]" if t["loss"] else t["token"] for t in sample) + "\n"
        for sample in shown
    ]
    size = {name: human_bytes(facts[name]) for name in facts if name.endswith(("bytes", "_step"))}
    later = size["up_bytes_per_later_step"]
    lines += [
        f"{facts['rows']} samples of {facts['tokens_median']} tokens (median), "
        f"{facts['tokens_max']} at most; {facts['supervised_tokens']} tokens carry loss",
        f"cut {facts['cut']} of {facts['num_layers']} layers, {facts['steps']} steps",
        f"each step sends {size['up_bytes_per_step']} and receives {size['down_bytes_per_step']}"
        + (f"; in later epochs it sends {later}" if later != size["up_bytes_per_step"] else ""),
        f"memory here: weights {size['client_weight_bytes']}, adapter and optimizer "
        f"{size['client_state_bytes']}, and activations",
        f"memory at the server: weights {size['trunk_weight_bytes']} for all tenants, adapter and "
        f"optimizer {size['trunk_state_bytes']} for this one, and activations",
        f"a step takes about {facts['client_s_per_step']:.2f} s here and "
        f"{facts['link_s_per_step']:.2f} s on the link; {facts['steps']} steps "
        f"{facts['eta_s_without_trunk'] / 60:.1f} min, and what the trunk needs for "
        f"{facts['trunk_flops_per_step'] / 1e12:.2f} TFLOP a step",
        "Nothing was sent.",
    ]
    return "\n".join(lines)
