"""What `cutlayer audit` attacks: samples that a run would send, or what one really sent."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlayer.cli.config import Run, connect_settings, read_run
from cutlayer.errors import ConfigError, DataError

__all__ = ["Subject", "rows_asked", "subject_of_config", "subject_of_run"]


@dataclass(frozen=True)
class Subject:
    """What is audited, and all that is known of how it was made."""

    public: Any
    """The public model at the run's cut."""
    departures: Sequence[Any]
    """What the server gets."""
    tokenizer: Any
    facts: dict[str, Any]
    """What the report says of the run."""
    defenses: Sequence[Any]
    trained: Sequence[str]
    """Parts that the client trains."""
    which: list[dict[str, int]]
    """Where each sequence comes from: the row of the data set, or step, forward and row."""
    releases: Sequence[Any]
    """Those of the sequence that was released most, or those that are planned."""
    delta: float | None
    assumptions: Sequence[str]
    digest: str
    """Of the data, the model and the settings; noise that is drawn anew left out."""


def subject_of_config(args: argparse.Namespace, tell: Any) -> Subject:
    """Return what the run's first steps would send; nothing is sent.

    Raises:
        ConfigError, DataError, ModelError: If the run or its data cannot be used.
    """
    from datasets.utils.logging import disable_progress_bar

    from cutlayer.audit.public import PublicModel
    from cutlayer.audit.traffic import made_here
    from cutlayer.audit.unfinished import digest_of
    from cutlayer.cli.data import load_tokenizer
    from cutlayer.cli.privacy import cost_of, parts_of
    from cutlayer.wire.codecs import codec_words, codecs_of

    disable_progress_bar()
    settings = read_run(args.config, args.overrides)
    given = connect_settings(settings)
    _refuse_encoders(given["task"])
    tokenizer = load_tokenizer(settings)
    numbers, rows = _rows_of(settings, tokenizer, args)
    defenses = given["defenses"]
    public = PublicModel.load(
        given["model"],
        bottom_layers=given["bottom_layers"],
        top_layers=given["top_layers"],
        revision=given["revision"],
    )
    for line in cost_of(
        defenses, settings.sft.max_length or 0, public.config.get_text_config().hidden_size
    ):
        tell(line)
    trained = parts_of(settings)
    departures = made_here(
        public,
        rows,
        batch=settings.sft.per_device_train_batch_size,
        trunk=_trunk_of(given),
        defenses=defenses,
        codec=given["codec"],
        gradients=bool({"bottom", "trunk"} & set(trained)),
    )
    formal = [defense for defense in defenses if defense.formal and hasattr(defense, "planned")]
    facts = {
        "model": given["model"],
        "revision": given["revision"] or "",
        "cut": str(public.cut),
        "codec": codec_words(codecs_of(given["codec"])),
        "defense": _named(defenses),
        "source": "samples",
    }
    known = {"trained": trained, "defenses": [d.describe() for d in defenses], **facts}
    return Subject(
        public=public,
        departures=departures,
        tokenizer=tokenizer,
        facts=facts,
        defenses=defenses,
        trained=trained,
        which=[{"row": number} for number in numbers],
        releases=[release for d in formal for release in d.releases(1) * d.planned],
        delta=formal[0].delta if formal else None,
        assumptions=["releases as planned: none has happened yet"] if formal else [],
        digest=digest_of(
            known | _weights_of(given["model"], given["revision"], public),
            [tensor for row in rows for tensor in row],
        ),
    )


def subject_of_run(args: argparse.Namespace) -> Subject:
    """Return what a run really sent.

    Raises:
        DataError: If the transcript or the ledger was altered, or there is none.
    """
    from transformers import AutoTokenizer

    from cutlayer.audit.public import PublicModel
    from cutlayer.audit.unfinished import digest_of
    from cutlayer.privacy.defenses import defense_of
    from cutlayer.privacy.transcript import read_transcript

    facts, departures = read_transcript(Path(args.run) / "transcript")
    _refuse_encoders(facts["task"])
    lower, upper, layers = facts["lower"], facts["upper"], facts["num_layers"]
    public = PublicModel.load(
        facts["model"],
        bottom_layers=lower,
        top_layers=layers - upper,
        revision=facts["revision"] or None,
    )
    defenses = [defense_of(**params) for params in facts["defenses"]]
    taken, which = _taken(departures, args)
    if not taken:
        raise DataError(
            f"the transcript of '{args.run}' holds no such sequence: none was recorded, or --rows "
            "names others than it has"
        )
    told = {
        "model": facts["model"],
        "revision": facts["revision"],
        "cut": f"{lower}:{upper}",
        "codec": facts["codec"],
        "defense": _named(defenses),
        "source": "transcript",
    }
    releases, delta = _booked(facts, defenses)
    tensors = [
        tensor
        for one in taken
        for tensor in (
            one.smashed_BTD,
            one.gradient_BTD,
            one.trunk_out_BTD,
            *one.carried.values(),
            *one.truth.values(),
        )
    ]
    return Subject(
        public=public,
        departures=taken,
        tokenizer=AutoTokenizer.from_pretrained(facts["model"], revision=facts["revision"] or None),
        facts=told,
        defenses=defenses,
        trained=facts["train"],
        which=which,
        releases=releases,
        delta=delta,
        assumptions=[],
        digest=digest_of(facts | _weights_of(facts["model"], facts["revision"], public), tensors),
    )


def _booked(facts: dict[str, Any], defenses: Sequence[Any]) -> tuple[list[Any], float | None]:
    """Return the releases of the most spent record, and delta, as the run's ledger has them."""
    from cutlayer.privacy.ledger import Ledger

    if "ledger" in facts:
        ledger = Ledger.read(Path(facts["ledger"]))
        return ledger.releases_of(), ledger.delta
    # Without a ledger nothing formal left, and what left has no epsilon whatever its number.
    return [release for defense in defenses for release in defense.releases(1)], None


def rows_asked(text: str | None) -> list[int] | None:
    """Return the numbers of `3,7,10-12`, in order; `None` if none were asked for.

    Raises:
        ConfigError: If it is no such list.
    """
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--rows '{text}' is no list of numbers from 0, such as 3,7,10-12")
        found |= set(range(int(first), int(last if dash else first) + 1))
    if not found:
        raise ConfigError(f"--rows '{text}' names no row: the smaller number comes first")
    return sorted(found)


def _taken(departures: Any, args: argparse.Namespace) -> tuple[list[Any], list[dict[str, int]]]:
    """Return the departures to attack, and where each of their sequences was."""
    from cutlayer.audit.traffic import picked

    asked = rows_asked(args.rows)
    taken, which, count = [], [], 0
    for departure in departures:
        size = len(departure.smashed_BTD)
        rows = [row for row in range(size) if asked is None or count + row in asked]
        where = {"step": departure.step, "forward": departure.number}
        which += [{"row": count + row, **where} for row in rows]
        taken += picked([departure], rows) if rows else []
        count += size
        if count >= args.samples if asked is None else count > asked[-1]:
            break
    return taken, which


def _rows_of(
    settings: Run, tokenizer: Any, args: argparse.Namespace
) -> tuple[list[int], list[tuple[Any, Any]]]:
    """Return the samples' numbers and the samples as (ids, labels), tokenized as for training."""
    import torch

    from cutlayer.cli.data import load_split
    from cutlayer.cli.preview import prepared

    data = load_split(settings, settings.data.dataset_train_split)
    numbers = rows_asked(args.rows) or list(range(min(args.samples, len(data))))
    if numbers[-1] >= len(data):
        raise ConfigError(
            f"--rows names row {numbers[-1]} and the data set has {len(data)}, counted from 0"
        )
    return numbers, [
        (torch.tensor(row["input_ids"]), torch.tensor(row.get("labels") or row["input_ids"]))
        for row in prepared(settings, data.select(numbers), tokenizer)
    ]


def _trunk_of(given: dict[str, Any]) -> Any:
    """Return the layers between: the server has them, so its attack on the labels has them too."""
    import torch

    from cutlayer.split.cut import Cut, Trunk
    from cutlayer.split.loading import load_trunk, open_checkpoint, skeleton_of

    checkpoint = open_checkpoint(given["model"], revision=given["revision"])
    skeleton = skeleton_of(checkpoint.config, given["task"])
    cut = Cut.leaving(
        bottom_layers=given["bottom_layers"],
        top_layers=given["top_layers"],
        num_layers=skeleton.anatomy.num_layers,
    )
    model = load_trunk(checkpoint, skeleton, cut, dtype=torch.float32)
    return Trunk(model.eval().requires_grad_(False), skeleton.anatomy, cut)


def _weights_of(model: str, revision: str | None, public: Any) -> dict[str, Any]:
    """Return digests that tell the public weights from others."""
    from cutlayer.audit.unfinished import digest_of
    from cutlayer.split.loading import layer_digests, open_checkpoint, skeleton_of

    checkpoint = open_checkpoint(model, revision=revision or None)
    anatomy = skeleton_of(checkpoint.config, "causal-lm").anatomy
    layers = layer_digests(checkpoint, anatomy, public.cut, trunk=False)
    return {"layers": layers, "head": digest_of({}, [public.head_VD[:16]])}


def _refuse_encoders(task: str) -> None:
    if task != "causal-lm":
        raise ConfigError(
            f"'cutlayer audit' attacks language models and this run's task is {task}: take its "
            "activations for readable, and call class_label_leak of cutlayer.audit.class_labels "
            "and the learned inverter on its tensors"
        )


def _named(defenses: Sequence[Any]) -> str:
    return ", ".join(defense.name for defense in defenses) or "none"
