"""`cutlayer generate`: generate text through the split, a KV cache on each side."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from cutlayer.cli.config import connect_settings, read_run
from cutlayer.cli.main import add_format, report, settle
from cutlayer.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    add = parser.add_argument
    add("--config", required=True, help="the run's YAML; --key value overrides")
    add("--prompt", required=True, action="append", help="a prompt; give it again for a batch")
    add("--adapter", help="adapter folder (default: the run's output_dir, if it has one)")
    add("--base", action="store_true", help="use no adapter")
    add("--system", help="a system message")
    add("--max_new_tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Generate and print.

    Raises:
        ConfigError: If this run's model does not generate, or not within its promise.
    """
    from cutlayer.cli.data import load_tokenizer
    from cutlayer.client.connect import connect

    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf:
        raise ConfigError(
            f"--max_new_tokens {args.max_new_tokens} must be at least 1 and --temperature "
            f"{args.temperature:g} a number of at least 0"
        )
    settle(args.threads)
    settings = read_run(args.config, args.overrides)
    tokenizer = load_tokenizer(settings)
    if args.system and not tokenizer.chat_template:
        raise ConfigError(
            "--system needs a chat template and this model's tokenizer has none: write it at the "
            "front of the prompt"
        )
    folder = Path(args.adapter or settings.sft.output_dir)
    kept_at_server = (folder / "TRUNK_IS_AT_THE_SERVER").exists()
    has_adapter = (folder / "adapter_config.json").exists() or bool(args.adapter)
    wanted = has_adapter and not args.base
    given = connect_settings(settings)
    _refuse_what_cannot_generate(given)
    if not wanted:
        given["peft_config"] = None
    model = connect(**{**given, "send_once": False}, take_up=wanted and kept_at_server)
    try:
        if wanted:
            model.take_up(folder)
        texts = answers(
            model,
            tokenizer,
            args.prompt,
            system=args.system,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=settings.sft.seed,
        )
    finally:
        model.close()
    facts = [{"prompt": p, "text": t} for p, t in zip(args.prompt, texts, strict=True)]
    report(args.format, {"generated": facts}, "\n".join(texts))
    return 0


def _refuse_what_cannot_generate(given: dict[str, Any]) -> None:
    if given["task"] != "causal-lm":
        raise ConfigError(f"split_task is {given['task']}, whose model generates no text")
    formal = [defense.name for defense in given["defenses"] if defense.formal]
    if formal:
        raise ConfigError(
            f"'{formal[0]}' books each release of a sequence, and each new token would be one more "
            "of the whole prompt: 'cutlayer merge' the adapter and generate in the unsplit model"
        )


def answers(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Return the model's answers; a chat model gets its chat template."""
    import torch

    if tokenizer.chat_template:
        head = [{"role": "system", "content": system}] if system else []
        prompts = [
            tokenizer.apply_chat_template(
                [*head, {"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
    batch = tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        # A template has them already; without one a prompt begins as it did in training.
        add_special_tokens=not tokenizer.chat_template,
    )
    if batch["input_ids"].shape[1] == 0:
        raise ConfigError("--prompt is empty and the tokenizer adds nothing to it: write a word")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    torch.manual_seed(seed)
    model.eval()
    with torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **(sampling or {"do_sample": False}),
        )
    return list(
        tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    )
