"""Do our learned inverter and BiSR reach the published figures? Bring the paper's model and text.

    python benchmarks/attacks/parity.py --model gpt2-large --family gpt2-large --text piqa.jsonl

The paper's weights and texts are in no package registry, so nothing of this runs by itself. The
settings are the authors' (`PUBLISHED_INVERTER`, `PUBLISHED`); ROUGE-L-F is theirs too, over tokens
that are decoded one by one and joined by blanks. Published at cut 6 on PIQA: SIP .944 (GPT-2-large)
and .933 (Llama-2-7B). It is accepted from .92 on.
"""

# Shapes:  T tokens

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rouge_score import rouge_scorer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.attacks.victim import Victim
from cutlayer.audit.bidirectional import PUBLISHED, bidirectional_recovery
from cutlayer.audit.finding import Finding
from cutlayer.audit.inverter import (
    PUBLISHED_INVERTER,
    learned_inversion,
    train_inverter,
)
from cutlayer.errors import ConfigError, CutlayerError, DataError

ACCEPTED = 0.92
LEAST = 64


def texts_of(path: Path) -> list[str]:
    """Return the texts of a file of JSON lines.

    Raises:
        DataError: If it cannot be read, or has too few.
    """
    try:
        texts = [str(json.loads(line)["text"]) for line in path.read_text().splitlines() if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--text '{path}' cannot be read ({type(error).__name__}): give JSON lines with 'text'"
        ) from error
    if len(texts) < 2 * LEAST:
        raise DataError(f"--text '{path}' has {len(texts)} texts: give {2 * LEAST} or more")
    return texts


def published_rouge(found: Finding, decode: Callable[[list[int]], str]) -> float:
    """Return ROUGE-L-F as the authors take it."""
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    scores = []
    for one in found.recovered:
        truth, guess = (" ".join(decode([i]) for i in ids) for ids in (one.truth, one.guess))
        scores.append(scorer.score(truth, guess)["rougeL"].fmeasure)
    return statistics.fmean(scores)


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Return ROUGE-L-F of SIP, and of BiSR(f) on some texts.

    Raises:
        DataError: If there is no such text.
        ConfigError: If there is no such model.
    """
    texts = texts_of(args.text)
    if not (Path(args.model) / "config.json").is_file():
        raise ConfigError(
            f"--model '{args.model}' is no model folder: download the paper's model and name it"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = [torch.tensor(tokenizer(text)["input_ids"][: args.tokens]) for text in texts]
    ids = [ids_T for ids_T in ids if len(ids_T) > 2]
    victims, aux = ids[:LEAST], ids[LEAST:]
    public = Victim(args.model).public(args.cut, 0)
    inverter = train_inverter(public, aux, settings=PUBLISHED_INVERTER)
    smashed = _sent(public.bottom, victims)
    figures = {
        "sip": published_rouge(learned_inversion(inverter, smashed, victims), tokenizer.decode)
    }
    if args.bisr:
        few = slice(0, args.bisr)
        found = bidirectional_recovery(
            public,
            inverter,
            smashed[few],
            victims[few],
            stages=("f",),
            settings=PUBLISHED[args.family],
        )
        figures["bisr_f"] = published_rouge(found, tokenizer.decode)
    return figures


@torch.no_grad()
def _sent(bottom: Callable[[Tensor], Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
    return [bottom(ids_T[None])[0] for ids_T in texts]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; return 0 if the figure is reached, 1 if not, 2 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the paper's model")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with 'text'")
    parser.add_argument("--family", choices=sorted(PUBLISHED), default="gpt2-large")
    parser.add_argument("--cut", type=int, default=6, help="bottom layers")
    parser.add_argument("--tokens", type=int, default=128, help="of each text at most")
    parser.add_argument("--bisr", type=int, default=0, help="texts for BiSR(f), 800 steps each")
    args = parser.parse_args(argv)
    try:
        figures = compare(args)
    except CutlayerError as error:
        print(error, file=sys.stderr)
        return 2
    for name, value in figures.items():
        word = "accepted" if value >= ACCEPTED else "NOT accepted"
        print(f"{name} ROUGE-L-F {value:.3f}: {word} ({ACCEPTED} or more)")
    return 0 if min(figures.values()) >= ACCEPTED else 1


if __name__ == "__main__":
    sys.exit(main())
