"""`split_dp_sgd`: train the client's own layers by DP-SGD, and write down what that promises."""

from __future__ import annotations

import difflib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cutlayer.cli.config import Run
from cutlayer.errors import ConfigError, NotFinite, StorageError

__all__ = ["GUARANTEE_FILE", "DpSgd", "dp_sgd_of", "refuse_what_does_not_fit", "train_privately"]

GUARANTEE_FILE = "guarantee.json"

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "packing": (False,),
    "padding_free": (False,),
    "gradient_checkpointing": (False,),
    "bf16": (False, None),
    "fp16": (False, None),
    "label_smoothing_factor": (0, 0.0),
    "neftune_noise_alpha": (None,),
}


@dataclass(frozen=True)
class DpSgd:
    """The parameters under `split_dp_sgd`."""

    target_epsilon: float
    """What the adapter of this run may spend."""
    delta: float
    """Less than one in all rows."""
    clip: float
    """Bound of the norm of one row's gradient."""
    total_epsilon: float | None = None
    """What all adapters of this data set may come to, no limit by default."""


def dp_sgd_of(run: Run) -> DpSgd:
    """Return the parameters of a run's DP-SGD.

    Raises:
        ConfigError: Naming all that is wrong with them.
    """
    given = run.split.dp_sgd or {}
    known = list(DpSgd.__dataclass_fields__)
    faults = []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            faults.append(f"{name} is unknown: " + (near[0] if near else ", ".join(known)))
    faults += [f"{name} is missing" for name in known[:3] if given.get(name) is None]
    numbers = {}
    for name in known:
        if given.get(name) is None:
            continue
        try:
            numbers[name] = float("nan" if isinstance(given[name], bool) else given[name])
        except (TypeError, ValueError):
            numbers[name] = math.nan
        if not (math.isfinite(numbers[name]) and numbers[name] > 0):
            faults.append(f"{name} = {given[name]!r} must be a number above 0")
    if faults:
        raise ConfigError("split_dp_sgd: " + "; ".join(faults))
    return DpSgd(**numbers)


def refuse_what_does_not_fit(run: Run, *, resume: bool) -> None:
    """Refuse settings under which rows would not be clipped one by one, or that would be ignored.

    Raises:
        ConfigError: Naming all of them.
    """
    dp_sgd_of(run)
    faults = [
        f"{name} must be {json.dumps(good[0])}"
        for name, good in _MUST_BE.items()
        if getattr(run.sft, name, good[0]) not in good
    ]
    if run.split.chunks != 1:
        faults.append("split_chunks must be 1")
    if str(run.sft.eval_strategy) not in ("no", "IntervalStrategy.NO"):
        faults.append("eval_strategy must be no")
    if resume:
        faults.append("--resume cannot be: there are no checkpoints, begin again")
    if faults:
        raise ConfigError("with split_dp_sgd " + "; ".join(faults))


def train_privately(run: Run, trainer: Any, model: Any) -> Any:
    """Train by a plain loop over Poisson batches; book the adapter and write what it promises.

    The trainer prepared the rows, and gives collation, optimizer and schedule; its own loop is not
    used. There are no checkpoints.

    Returns:
        What `trainer.train` would.

    Raises:
        ConfigError: If the numbers make no sense for this data.
        BudgetExhausted: If the adapters of this data would come to more than `total_epsilon`.
        NotFinite: If a gradient is NaN or infinite. Nothing was given out.
        StorageError: If it cannot be written down.
    """
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import TrainOutput

    from cutlayer.privacy.adapter_book import AdapterBook
    from cutlayer.privacy.dp_sgd import make_private

    asked, sft = dp_sgd_of(run), run.sft
    rows = trainer.get_train_dataloader()
    expected = sft.per_device_train_batch_size * sft.gradient_accumulation_steps
    items = len(rows.dataset)
    if not 0 < expected <= items:
        raise ConfigError(
            f"split_dp_sgd draws {expected} of {items} rows a step (per_device_train_batch_size "
            "times gradient_accumulation_steps): ask for fewer"
        )
    steps = sft.max_steps if sft.max_steps > 0 else int(sft.num_train_epochs * (items // expected))
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    private = make_private(
        model,
        trainer.optimizer,
        DataLoader(rows.dataset, batch_size=expected, collate_fn=rows.collate_fn),
        delta=asked.delta,
        clip=asked.clip,
        epsilon=asked.target_epsilon,
        steps=steps,
        micro_batch=sft.per_device_train_batch_size,
        unit=f"one row of {Path(str(run.data.dataset_name)).name}",
    )
    planned = (private.noise_multiplier, expected / items, steps)
    book = AdapterBook(_book_of(run))
    try:
        if asked.total_epsilon is not None:
            book.refuse_beyond(asked.total_epsilon, asked.delta, planned)
        started_s = time.perf_counter()
        losses = _loop(private, trainer, steps)
        private.close()
        if not all(math.isfinite(loss) for loss in losses):
            raise NotFinite("a loss is not finite: nothing was saved; lower learning_rate")
        book.book(*planned, name=Path(sft.output_dir).name)
        _write_guarantee(run, private, model, book, asked)
    finally:
        book.close()
    seen = [loss for loss in losses if loss] or [0.0]
    metrics = {"train_runtime": time.perf_counter() - started_s}
    return TrainOutput(steps, sum(seen) / len(seen), metrics)


def _loop(private: Any, trainer: Any, steps: int) -> list[float]:
    losses: list[float] = []
    every = max(int(trainer.args.logging_steps), 1)
    while len(losses) < steps:
        for batch in private.data_loader:
            if len(losses) == steps:
                break
            losses.append(private.step(trainer._prepare_inputs(batch) if batch else {}))
            trainer.lr_scheduler.step()
            trainer.state.global_step = len(losses)
            if len(losses) % every == 0:
                told = f"step {len(losses)}/{steps}  loss {losses[-1]:.4f} (not to be given away)"
                print(told, file=sys.stderr, flush=True)
    return losses


def _book_of(run: Run) -> Path:
    """Return where the adapters of this data are written down: beside a local data set."""
    name = str(run.data.dataset_name)
    home = Path(f"{name.rstrip('/')}.adapters.jsonl")
    return home if Path(name).exists() else Path(run.sft.output_dir) / "adapters.jsonl"


def _write_guarantee(run: Run, private: Any, model: Any, book: Any, asked: DpSgd) -> None:
    from cutlayer.cli.privacy import parts_of
    from cutlayer.privacy.guarantee import guarantee
    from cutlayer.privacy.profiles import profile_of

    found = private.guarantee()
    together = book.total(asked.delta)
    profile, ledger = profile_of(run.split.privacy_profile), model.remote_trunk.departures.ledger
    server: dict[str, Any] = {"profile": profile.name, "verdict": profile.verdict}
    if run.split.defenses:
        server["defenses"] = [str(params.get("name")) for params in run.split.defenses]
    if ledger is not None:
        server |= guarantee(ledger.releases_of(), delta=ledger.delta, trained=parts_of(run))
    facts = {
        "format": 1,
        "against_recipients_of_the_adapter": {
            **asdict(found),
            "words": str(found),
            "adapters_of_this_data": len(book),
            "epsilon_of_all_of_them": together.pld,
        },
        "against_the_server": server,
        "against_both_together": "no number: the server knows who was in each batch, so a "
        "recipient who joins it has no sampling to be fooled by",
    }
    folder = Path(run.sft.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GUARANTEE_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write to '{folder}' ({error.strerror})") from error
