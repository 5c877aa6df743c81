"""Split every model type of transformers and compare it with the whole, bit for bit.

python -m tests.families --write docs/families.md     # the table, one row a type
python -m tests.families llama gpt2                    # some types, on the screen
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging as transformers_logging

from cutlayer.errors import CannotCut
from cutlayer.split.cut import Cut, refuse_by_name
from cutlayer.split.loading import skeleton_of
from tests.loopback import differences, generated, split_copies, split_loaded
from tests.tiny import (
    CAUSAL_TYPES,
    CLASSIFICATION_TYPES,
    NotBuildable,
    Task,
    tiny_batch,
    tiny_config,
    tiny_model,
)

AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
_MAPPINGS: dict[str, Any] = {
    "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
LAYERS = 6
PADDINGS = ("none", "right", "left")
SECONDS_PER_TYPE = 120

# Nothing below and nothing above; one layer; some of each.
CUTS = (Cut(0, LAYERS), Cut(1, 2), Cut(2, 5))


@dataclass(frozen=True)
class Verdict:
    """What became of one type."""

    model_type: str
    task: Task
    kind: str
    """`exact`, `refused`, `not buildable` or `DIFFERS`."""
    reason: str = ""
    generates: str = ""


def _attentions(model_type: str, task: Task) -> list[str]:
    found = []
    for name in ("eager", "sdpa"):
        try:
            tiny_model(model_type, task=task, num_layers=2, attn_implementation=name)
        except NotBuildable:
            continue
        found.append(name)
    return found


def faults_of(
    model_type: str,
    task: Task,
    *,
    attention: str,
    dtype: torch.dtype = torch.float32,
    cuts: tuple[Cut, ...] = CUTS,
    paddings: tuple[str, ...] = PADDINGS,
    loaded: bool = True,
) -> list[str]:
    """Compare a type's split with the whole; return what differs, empty if it is exact.

    Args:
        model_type: A model type of the task's mapping.
        task: The task.
        attention: The attention implementation.
        dtype: The dtype of the weights.
        cuts: Where to cut.
        paddings: How the batches are padded.
        loaded: Also split as the product loads it, from a folder of two shards, at the last cut.

    Raises:
        NotBuildable: If there is no small model of this type.
        CannotCut: If the type is refused.
    """
    whole = tiny_model(
        model_type, task=task, num_layers=LAYERS, dtype=dtype, attn_implementation=attention
    )
    refuse_by_name(whole.config)
    faults = []
    for cut in cuts:
        split = split_copies(whole, cut)
        for padding in paddings:
            batch = tiny_batch(whole.config, task=task, padding=padding)
            found = differences(whole, split, batch)
            faults += [f"{cut} {attention} {padding}: {fault}" for fault in found]
    # The text model of a few multimodal types can be built but has no folder of its own.
    if loaded and type(whole.config) in _MAPPINGS[task]:
        with tempfile.TemporaryDirectory() as folder:
            whole.save_pretrained(folder)
            settings = {"dtype": dtype, "attn_implementation": attention}
            whole = AUTO[task].from_pretrained(folder, **settings)
            split = split_loaded(Path(folder), cuts[-1], task, **settings)
            batch = tiny_batch(whole.config, task=task, padding=paddings[-1])
            found = differences(whole, split, batch)
            faults += [f"{cuts[-1]} {attention} loaded: {fault}" for fault in found]
    return faults


def generation_of(model_type: str) -> str:
    """Return how greedy generation with a KV cache through the split compares with the whole's."""
    whole = tiny_model(model_type, num_layers=LAYERS)
    batch = tiny_batch(whole.config, task="causal-lm", padding="left")
    asked = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    try:
        expected = generated(whole, batch, **asked)
    except Exception as error:
        return f"the whole model does not generate ({type(error).__name__})"
    try:
        found = generated(split_copies(whole, Cut(2, 5)).client, batch, **asked)
    except Exception as error:
        return f"fails: {_one_line(error)}"
    same = len(expected) == len(found)
    same = same and all(map(torch.equal, expected, found))
    return "exact" if same else "DIFFERS"


def verdict_on(model_type: str, task: Task) -> Verdict:
    """Try one type in every way and return what became of it."""
    _settle()
    try:
        with _time_limit(SECONDS_PER_TYPE):
            return _verdict_on(model_type, task)
    except TimeoutError:
        reason = f"took longer than {SECONDS_PER_TYPE} s"
        return Verdict(model_type, task, "not buildable", reason)


def _verdict_on(model_type: str, task: Task) -> Verdict:
    try:
        config = tiny_config(model_type, task=task, num_layers=LAYERS)
        refuse_by_name(config)
        tiny_model(model_type, task=task, num_layers=LAYERS)
        if type(config) in _MAPPINGS[task]:
            skeleton_of(config, task)
        faults = []
        for attention in _attentions(model_type, task):
            faults += faults_of(model_type, task, attention=attention)
    except CannotCut as error:
        return Verdict(model_type, task, "refused", _reason(str(error)))
    except NotBuildable as error:
        return Verdict(model_type, task, "not buildable", str(error))
    except Exception as error:
        return Verdict(model_type, task, "DIFFERS", _one_line(error))
    if faults:
        return Verdict(model_type, task, "DIFFERS", f"{len(faults)} faults, first {faults[0]}")
    generates = generation_of(model_type) if task == "causal-lm" else ""
    as_text = "" if config.model_type == model_type else f"as {config.model_type}"
    return Verdict(model_type, task, "exact", as_text, generates)


def _reason(message: str) -> str:
    return message.partition("cannot be cut: ")[2].partition("; docs/")[0] or message


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _settle() -> None:
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)


_HEADER = """# Which models can be cut

Written by `make families` (`python -m tests.families --write docs/families.md`). Each type of
transformers' causal-LM and sequence-classification mappings is built small from its config and
split at three cuts, one of which leaves no layer to the client, with no, right and left padding,
with eager attention and sdpa where it has them, from copies and as a client and a server load it.
**Exact** means that logits, loss and every gradient are those of the unsplit model, bit for bit.
A multimodal type is tried as its text model, from a checkpoint of that alone. *Generation* compares
greedy decoding with the KV cache on both sides, logits included.

"""


def table(verdicts: list[Verdict]) -> str:
    """Return the page docs/families.md."""
    page = _HEADER
    for task in AUTO:
        rows = [v for v in verdicts if v.task == task]
        counts = {k: sum(v.kind == k for v in rows) for k in dict.fromkeys(v.kind for v in rows)}
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        page += f"## {task}\n\n{len(rows)} types: {counted}.\n\n"
        page += "| type | split | generation |\n|---|---|---|\n"
        for v in rows:
            told = v.kind + (f": {v.reason}" if v.reason else "")
            page += f"| `{v.model_type}` | {told.replace('|', '/')} | {v.generates} |\n"
        page += "\n"
    return page.rstrip() + "\n"


def main() -> int:
    """Try all types, or those that are named; return 1 if one differs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("types", nargs="*", help="model types; every type if none")
    asked = parser.parse_args()
    jobs: list[tuple[str, Task]] = [
        *((name, "causal-lm") for name in CAUSAL_TYPES),
        *((name, "sequence-classification") for name in CLASSIFICATION_TYPES),
    ]
    jobs = [job for job in jobs if not asked.types or job[0] in asked.types]
    verdicts = []
    with ProcessPoolExecutor(asked.processes) as pool:
        for v in pool.map(verdict_on, *zip(*jobs, strict=True)):
            verdicts.append(v)
            print(
                f"{v.task:<24} {v.model_type:<26} {v.kind:<14} {v.reason} | {v.generates}",
                flush=True,
            )
    if asked.write:
        asked.write.parent.mkdir(parents=True, exist_ok=True)
        asked.write.write_text(table(verdicts))
    return int(any("DIFFERS" in (v.kind, v.generates) for v in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
