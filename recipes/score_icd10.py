#!/usr/bin/env python3
"""Score a model on held-out ICD-10-CM wordings: how many does it put into the right chapter?

The model answers by greedy generation, limited at every step to tokens that spell one of the
chapter names.  That is fair to the untrained model, which does not know the short names used here
and would otherwise lose points for its phrasing, and a right answer always is the exact name.
``free=True`` (``--free``) lifts the limit and asks for the exact name unaided.  Example::

    python recipes/score_icd10.py --model .data/smollm2 --data .data/icd10/test.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Sequence[Mapping[str, str]]]


def answer_of(row: Row) -> str:
    """Return the right answer of a row: the text of its completion."""
    return row["completion"][0]["content"]


def normalise(text: str) -> str:
    """Return a text without differences of case, blanks and a closing full stop."""
    return " ".join(text.casefold().split()).rstrip(".")


def continuations(names: Sequence[Sequence[int]], end: int) -> dict[tuple[int, ...], list[int]]:
    """Map every prefix of the names (as token ids) to the ids that may follow it."""
    follow: dict[tuple[int, ...], set[int]] = {}
    for name in names:
        ids = (*name, end)
        for length in range(len(ids)):
            follow.setdefault(tuple(ids[:length]), set()).add(ids[length])
    return {prefix: sorted(ids) for prefix, ids in follow.items()}


def accuracy(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int = 25,
    *,
    labels: Sequence[str] | None = None,
    free: bool = False,
) -> tuple[float, list[str]]:
    """Return the share of rows answered rightly, and the answers in the order of the rows.

    ``model`` is any transformers or peft model with ``generate``.  ``labels`` are the names to
    choose from (the distinct answers of ``rows`` if left out).  The tokenizer is left as it was,
    and so is the model's train/eval mode.
    """
    import torch

    if not rows:
        raise ValueError("there are no rows to score")
    names = list(dict.fromkeys(labels or sorted({answer_of(row) for row in rows})))
    spelled = [tokenizer.encode(name, add_special_tokens=False) for name in names]
    end = tokenizer.eos_token_id
    follow = continuations(spelled, end)
    # A name is known at the first token that no other name shares, so no more tokens are needed.
    if free:
        steps = max(map(len, spelled)) + 1
    else:
        steps = 1 + max((len(prefix) for prefix, ids in follow.items() if len(ids) > 1), default=0)

    prompts = [
        tokenizer.apply_chat_template(
            list(row["prompt"]), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for row in rows
    ]
    # Prompts of like length go together, which saves padding.
    order = sorted(range(len(rows)), key=lambda index: (len(prompts[index]), index))
    answers = [""] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(prompts[index]) for index in batch)
            pads = [width - len(prompts[index]) for index in batch]
            ids = [[end] * pad + prompts[index] for pad, index in zip(pads, batch, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in pads]

            def allowed(_: int, sequence: Any, width: int = width) -> list[int]:
                return follow.get(tuple(sequence[width:].tolist()), [end])

            with torch.no_grad():
                output = model.generate(
                    input_ids=torch.tensor(ids, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    max_new_tokens=steps,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=end,
                    prefix_allowed_tokens_fn=None if free else allowed,
                )
            for index, sequence in zip(batch, output[:, width:].tolist(), strict=True):
                tokens = sequence[: sequence.index(end)] if end in sequence else sequence
                if free:
                    answers[index] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                else:
                    # The shortest one, in case a name is the beginning of another.
                    _, answers[index] = min(
                        (len(spelling), name)
                        for name, spelling in zip(names, spelled, strict=True)
                        if spelling[: len(tokens)] == tokens
                    )
    finally:
        model.train(was_training)
    right = sum(
        normalise(answer) == normalise(answer_of(row))
        for answer, row in zip(answers, rows, strict=True)
    )
    return right / len(rows), answers


def load(model: Path, adapter: Path | None, dtype: str) -> tuple[Any, Any]:
    """Return the model in a local folder, with the adapter of another if given; and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(model), dtype=getattr(torch, dtype), local_files_only=True
    )
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    return loaded, tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 2 the person must act)."""
    parser = argparse.ArgumentParser(
        description="Score a model folder on held-out ICD-10-CM wordings."
    )
    parser.add_argument("--model", type=Path, required=True, help="the model folder")
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter folder to put on it")
    parser.add_argument("--data", type=Path, required=True, help="test.jsonl of prepare_icd10.py")
    parser.add_argument("--limit", type=int, help="score the first N rows only")
    parser.add_argument("--batch-size", type=int, default=25, help="rows at a time (default: 25)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch decides)")
    parser.add_argument("--free", action="store_true", help="do not limit answers to the names")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    args = parser.parse_args(argv)
    for path in (args.model, args.adapter, args.data):
        if path is not None and not path.exists():
            print(f"score_icd10: {path} does not exist.", file=sys.stderr)
            return 2

    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    lines = args.data.read_text(encoding="utf-8").splitlines()
    all_rows = [json.loads(line) for line in lines if line.strip()]
    labels = sorted({answer_of(row) for row in all_rows})
    rows = all_rows[: args.limit]
    model, tokenizer = load(args.model, args.adapter, args.dtype)
    wall, cpu = time.perf_counter(), time.process_time()
    share, answers = accuracy(
        model, tokenizer, rows, args.batch_size, labels=labels, free=args.free
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    counts = Counter(answer_of(row) for row in rows)
    majority = max(counts.values()) / len(rows)
    if args.format == "json":
        report = {
            "accuracy": share,
            "rows": len(rows),
            "correct": round(share * len(rows)),
            "majority_accuracy": majority,
            "free": args.free,
            "wall_seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "answers": answers,
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(
            f"accuracy {share:.3f} on {len(rows)} rows (commonest chapter {majority:.3f}), "
            f"{wall:.1f} s wall, {cpu:.1f} s CPU"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
