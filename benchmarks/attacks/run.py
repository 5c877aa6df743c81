"""What does a server read of real text on real weights?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import Result, make_workload, parser_of, scratch, settings_of  # noqa: E402
from cutlayer.audit.battery import Rows  # noqa: E402
from cutlayer.audit.candidates import CandidateTable  # noqa: E402
from cutlayer.audit.finding import Finding  # noqa: E402
from cutlayer.audit.forward_search import SearchSettings, forward_search  # noqa: E402
from cutlayer.audit.frontiers import by_codec, by_noise  # noqa: E402
from cutlayer.audit.inverter import learned_inversion, train_inverter  # noqa: E402
from cutlayer.audit.labels import label_inversion  # noqa: E402
from cutlayer.audit.public import PublicModel  # noqa: E402
from cutlayer.audit.traffic import made_here, texts_of  # noqa: E402
from cutlayer.split.cut import Cut, Trunk  # noqa: E402
from cutlayer.split.loading import load_trunk, open_checkpoint, skeleton_of  # noqa: E402


def rated(name: str, found: Finding) -> dict[str, float]:
    """Return a rate with its interval."""
    low, high = found.trr_ci
    return {name: found.trr, f"{name}_low": low, f"{name}_high": high}


def forward(public: PublicModel, rows: Rows) -> tuple[dict[str, float], CandidateTable]:
    """Search undefended activations over the whole vocabulary."""
    texts = texts_of(made_here(public, rows, gradients=False))
    table = CandidateTable(public)
    commonest = torch.cat([ids for ids, _labels in rows]).mode().values
    found = forward_search(
        public,
        [text.smashed_TD for text in texts],
        [text.ids_T for text in texts],
        SearchSettings(),
        baseline=[torch.full_like(text.ids_T, int(commonest)) for text in texts],
        table=table,
    )
    figures = rated("a1_clean_trr", found) | {
        "a1_exact": found.exact,
        "prior_trr": found.prior_trr,
        "a1_sequences": found.sequences,
        "a1_tokens": found.tokens,
        "a1_seconds_per_token": found.extra["seconds_per_token"],
        "a1_candidates_median": found.extra["candidates_median"],
    }
    return figures, table


def trunk_between(model: str, cut: Cut) -> Trunk:
    """Return the layers between the client's."""
    checkpoint = open_checkpoint(model)
    skeleton = skeleton_of(checkpoint.config, "causal-lm")
    loaded = load_trunk(checkpoint, skeleton, cut, dtype=torch.float32)
    return Trunk(loaded.eval().requires_grad_(False), skeleton.anatomy, cut)


def labels(model: str, rows: Rows, top_layers: int) -> Finding:
    """Invert the labels of one batch, with so many top layers at the client."""
    public = PublicModel.load(model, bottom_layers=2, top_layers=top_layers)
    sent = made_here(public, rows, batch=len(rows), trunk=trunk_between(model, public.cut))
    return label_inversion(
        public, sent, [d.trunk_out_BTD for d in sent if d.trunk_out_BTD is not None]
    )


def wordings(model: str, text: Path, count: int) -> list[Tensor]:
    """Return single wordings, tokenized."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line) for line in text.read_text().splitlines()[:count]]
    texts = [sample["prompt"][-1]["content"] for sample in lines]
    ids = [torch.tensor(tokenizer(t)["input_ids"]) for t in texts]
    return [ids_T for ids_T in ids if len(ids_T) > 2]


def learned(model: str, text: Path, sequences: int) -> dict[str, float]:
    """Train an inverter on wordings of the training set, and read held-out ones."""
    public = PublicModel.load(model, bottom_layers=2, top_layers=2)
    victims = wordings(model, text.with_name("test.jsonl"), sequences)
    inverter = train_inverter(public, wordings(model, text, 2100))
    smashed = [public.bottom(ids_T[None])[0] for ids_T in victims]
    found = learned_inversion(inverter, smashed, victims)
    figures = {"a2_in_domain_rouge_l": found.rouge["L"], "a2_sequences": found.sequences}
    return rated("a2_in_domain_trr", found) | figures


def rows_of(tokens: Path, length: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return sequences of one length; every token is its predecessor's label."""
    from safetensors.torch import load_file

    ids = load_file(tokens)["tokens"].flatten()
    pieces: Sequence[Tensor] = ids[: length * count].view(-1, length)
    return [(piece, piece) for piece in pieces]


def main() -> None:
    """Attack."""
    parser = parser_of(__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1 if args.quick else 2)
    figures: dict[str, Any] = {}
    with ExitStack() as stack, torch.no_grad():
        folder = stack.enter_context(scratch())
        workload = make_workload(args, folder, batches=8)
        settings = settings_of(workload, args, sequences=args.sequences, tokens=args.tokens)
        count = 4 if args.quick else args.sequences
        rows = rows_of(Path(workload.tokens), args.tokens if not args.quick else 12, count)
        public = PublicModel.load(workload.model, bottom_layers=2, top_layers=2)
        figures, table = forward(public, rows)
        print(figures, file=sys.stderr)
        few = rows[: 2 if args.quick else 4]
        for one in (by_codec(public, table, few), by_noise(public, table, few)):
            for point in one["points"]:
                kind = "noise_" if one["axis"].startswith("noise") else ""
                name = f"a1_{kind}{point['x']}_trr".replace(" ", "_")
                figures |= {name: point["trr"], f"{name}_low": point["low"]}
                figures[f"{name}_high"] = point["high"]
        batch = 2 if args.quick else 8
        for top_layers in (0, 1, 2) if args.quick else (0, 1, 2, 4):
            short = rows_of(Path(workload.tokens), 12 if args.quick else 32, batch)
            figures |= rated(f"a4_m{top_layers}", labels(workload.model, short, top_layers))
            print(figures, file=sys.stderr)
        for length in () if args.quick else (128, 256):
            longer = rows_of(Path(workload.tokens), length, 8 if length == 128 else 4)
            figures |= rated(f"a4_length_{length}_m2", labels(workload.model, longer, 2))
        if not args.quick:
            figures |= learned(workload.model, args.text, args.sequences)
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
