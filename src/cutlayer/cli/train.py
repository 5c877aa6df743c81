"""`cutlayer train`: fine-tune through the split with TRL's own trainer."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from cutlayer.cli.config import Run, connect_settings, read_run
from cutlayer.cli.dp import refuse_what_does_not_fit, train_privately
from cutlayer.cli.main import add_format, report, settle
from cutlayer.cli.reattack import adversary_of, reattack, refuse_what_cannot_be_attacked
from cutlayer.errors import ConfigError, NotFinite


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("--config", required=True, help="the run's YAML; --key value overrides")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if any"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Train and write the adapter."""
    from cutlayer.cli.interrupt import Interrupt

    settings = read_run(args.config, args.overrides)
    if settings.split.dp_sgd is not None:
        refuse_what_does_not_fit(settings, resume=args.resume)
    refuse_what_cannot_be_attacked(settings)
    trainer, model = make_trainer(settings, threads=args.threads, resume=args.resume)
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    output = Path(settings.sft.output_dir)
    is_done = False
    try:
        if model.connection.claims:
            print(f"note: the server is {model.connection.claims}", file=sys.stderr)
        if model.keeps_adapter:
            print("note: this server keeps the trunk's half of the adapter; merge will not have it")
        if settings.split.dp_sgd is not None:
            result = train_privately(settings, trainer, model)
        else:
            result = trainer.train(resume_from_checkpoint=True if args.resume else None)
        if interrupt.came and trainer.state.global_step < trainer.state.max_steps:
            return _stopped(args, trainer)
        if not math.isfinite(result.training_loss):
            raise NotFinite(
                f"the training loss is {result.training_loss}: nothing was saved; lower "
                "learning_rate, or look at the data with 'cutlayer preview'"
            )
        if adversary_of(model) is not None:
            verdict = reattack(settings, trainer, model)["after"]["verdict"]
            print(f"note: attacked anew, the bottom's activations are {verdict}", file=sys.stderr)
        trainer.save_model()
        from cutlayer.cli.card import write_card

        write_card(output, settings, trainer, model)
        facts = facts_of(trainer, model, result)
        is_done = True
    finally:
        model.close(keep_rows=not is_done)
    report(
        args.format,
        {"output_dir": str(output), **facts},
        f"trained {facts['steps']} steps, loss {facts['training_loss']:.4f}; the adapter is in "
        f"{output}",
    )
    return 0


def _stopped(args: argparse.Namespace, trainer: Any) -> int:
    done, total = trainer.state.global_step, trainer.state.max_steps
    report(
        args.format,
        {"output_dir": trainer.args.output_dir, "stopped_at_step": done, "of_steps": total},
        f"stopped after step {done} of {total} and saved it; go on with: cutlayer train --config "
        f"{args.config} --resume",
    )
    return 130


def facts_of(trainer: Any, model: Any, result: Any) -> dict[str, Any]:
    """Return what a run measured of itself."""
    traffic = model.connection.traffic
    return {
        "steps": trainer.state.global_step,
        "training_loss": result.training_loss,
        "seconds": result.metrics["train_runtime"],
        "sent_bytes": traffic.sent_bytes,
        "received_bytes": traffic.received_bytes,
        "waited_s": traffic.waited_s,
        "trunk_s": traffic.trunk_s,
        "chunks": model.chunks,
        **({"rows": model.by_rows.once.counts()} if model.by_rows else {}),
        "attestation": str(model.connection.claims or "none asked for"),
    }


def make_trainer(
    settings: Run, *, threads: int | None = None, resume: bool = False
) -> tuple[Any, Any]:
    """Return a trainer over the split model, ready to train, and the model.

    Args:
        settings: The run.
        threads: CPU threads; torch's choice by default.
        resume: Whether the run goes on from a checkpoint, and so does its transcript.

    Raises:
        ConfigError, DataError: If the run cannot be trained on.
        ConnectionFailed, Refused: If the server cannot be used.
    """
    from datasets.utils.logging import disable_progress_bar
    from transformers import PrinterCallback, ProgressCallback

    from cutlayer.cli.data import (
        check_lengths,
        check_supervised,
        classes_of,
        in_the_trainers_words,
        load_split,
        load_tokenizer,
    )
    from cutlayer.cli.privacy import cost_of, ledger_of, transcript_of
    from cutlayer.cli.progress import LiveProgress
    from cutlayer.client.connect import connect
    from cutlayer.client.training import attach
    from cutlayer.split.loading import open_checkpoint, skeleton_of

    settle(threads)
    disable_progress_bar()
    if not settings.model.use_peft:
        raise ConfigError("use_peft must be true: what is trained through the split is a LoRA")
    checkpoint = open_checkpoint(
        settings.model.model_name_or_path, revision=connect_settings(settings)["revision"]
    )
    check_lengths(settings, checkpoint.config)
    data = load_split(settings, settings.data.dataset_train_split)
    held_out = None
    if str(settings.sft.eval_strategy) not in ("no", "IntervalStrategy.NO"):
        held_out = load_split(settings, settings.data.dataset_test_split)
    tokenizer = load_tokenizer(settings)
    given = connect_settings(settings)
    if settings.split.task == "sequence-classification":
        given["num_labels"] = classes_of(data, checkpoint.config, given["model"])
    layers = skeleton_of(checkpoint.config, given["task"]).anatomy.num_layers
    width = checkpoint.config.get_text_config().hidden_size
    for line in cost_of(given["defenses"], settings.sft.max_length or 0, width):
        print(line, file=sys.stderr)
    ledger = ledger_of(settings, given["defenses"], len(data))
    try:
        transcript = transcript_of(settings, given, checkpoint, layers, ledger, resume=resume)
        model = connect(**given, ledger=ledger, transcript=transcript)
    except BaseException:
        if ledger is not None:
            ledger.close()
        raise
    try:
        with in_the_trainers_words():
            trainer = _trainer(settings, model, tokenizer, data, held_out)
        if settings.split.task == "causal-lm":
            packed = settings.sft.packing
            check_supervised(trainer.train_dataset, of=len(data), packed=packed)
    except BaseException:
        model.close()
        raise
    attach(trainer)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LiveProgress(model.connection))
    return trainer, model


def _trainer(settings: Run, model: Any, tokenizer: Any, data: Any, held_out: Any) -> Any:
    if settings.split.task == "causal-lm":
        from trl import SFTTrainer

        return SFTTrainer(
            model=model,
            args=settings.sft,
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
    from transformers import DataCollatorWithPadding, Trainer

    def tokenized(rows: Any) -> Any:
        def encode(batch: Any) -> Any:
            return tokenizer(batch["text"], truncation=True, max_length=settings.sft.max_length)

        return rows.map(encode, batched=True, remove_columns=["text"])

    return Trainer(
        model=model,
        args=settings.sft,
        train_dataset=tokenized(data),
        eval_dataset=tokenized(held_out) if held_out is not None else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
