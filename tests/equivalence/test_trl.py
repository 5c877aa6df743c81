"""TRL does not notice: its SFTTrainer, unmodified, trains a split model as it does a whole one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import cutlayer
from cutlayer.errors import CannotCut, ConfigError
from tests.site import Loop, Site, adapter_of, batch_of, equal, lora, site_of
from tests.tokens import dataset, tokenizer

WORDS = ("loss", "grad_norm", "learning_rate", "eval_loss")


def settings_of(folder: Path, **settings: Any) -> SFTConfig:
    """Return the settings of a run of 20 optimizer steps in which the clipping bites."""
    asked = {
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 5,
        "lr_scheduler_type": "cosine",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 64,
        "seed": 3,
        "dataset_num_proc": None,
    }
    return SFTConfig(output_dir=str(folder), **{**asked, **settings})


def trainer_of(model: Any, folder: Path, **settings: Any) -> SFTTrainer:
    """Return an SFTTrainer; a split model is attached to it, and nothing else is different."""
    trainer = SFTTrainer(
        model=model,
        args=settings_of(folder, **settings),
        train_dataset=dataset(48),
        eval_dataset=dataset(6, seed=1),
        processing_class=tokenizer(),
    )
    if hasattr(model, "remote_trunk"):
        cutlayer.attach(trainer)
    return trainer


def logged(trainer: SFTTrainer) -> list[dict[str, float]]:
    """Return what was logged at every step, without times."""
    history = [
        {k: v for k, v in entry.items() if k in WORDS} for entry in trainer.state.log_history
    ]
    return [entry for entry in history if entry]


@pytest.fixture(scope="module")
def whole_run(llama: Site, tmp_path_factory: pytest.TempPathFactory) -> tuple[SFTTrainer, Any]:
    """The unsplit run: 20 steps, with an evaluation after every seventh."""
    whole = llama.unsplit()
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(whole, folder, eval_strategy="steps", eval_steps=7)
    trainer.train()
    return trainer, whole


def test_twenty_steps_are_those_of_the_unsplit_trainer(llama: Site, whole_run: Any, tmp_path: Path):
    """Losses, grad norms, evaluation losses and the final adapter are equal, key for key."""
    whole_trainer, whole = whole_run

    with llama.connect() as split:
        trainer = trainer_of(split, tmp_path, eval_strategy="steps", eval_steps=7)
        trainer.train()
        adapter = adapter_of(split)

    assert len(logged(trainer)) >= 20
    assert logged(whole_trainer) == logged(trainer)
    assert min(entry.get("grad_norm", 1) for entry in logged(trainer)) > 0.05
    assert equal(adapter_of(whole), adapter)


def test_attaching_twice_is_attaching_once(llama: Site, tmp_path: Path):
    """A cell of a notebook that is run again neither steps the trunk twice nor leaves clipping."""
    whole = llama.unsplit()
    trainer_of(whole, tmp_path / "whole", max_steps=4).train()

    with llama.connect() as split:
        trainer = trainer_of(split, tmp_path, max_steps=4)
        first = cutlayer.attach(trainer)
        assert cutlayer.attach(trainer) is first
        trainer.train()
        adapter = adapter_of(split)
        loop = Loop.over(split)
        assert cutlayer.attach(loop.optimizer, split) is cutlayer.attach(loop.optimizer, split)

    assert equal(adapter_of(whole), adapter)


def test_evaluation_does_not_disturb_training(llama: Site, whole_run: Any, tmp_path: Path):
    """A run without evaluations ends with the adapter of the run that had some."""
    _trainer, whole = whole_run

    with llama.connect() as split:
        trainer_of(split, tmp_path).train()
        adapter = adapter_of(split)

    assert equal(adapter_of(whole), adapter)


def test_saved_model_is_one_ordinary_adapter(llama: Site, tmp_path: Path):
    """`save_model` writes a folder that stock peft loads into the unsplit model, logits equal."""
    batch = batch_of(7)
    with llama.connect() as split:
        trainer = trainer_of(split, tmp_path, max_steps=3)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        split.eval()
        with torch.no_grad():
            found = split(**batch).logits

    base = AutoModelForCausalLM.from_pretrained(llama.folder)
    stock = PeftModel.from_pretrained(base, tmp_path / "final").eval()

    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, found)


def test_resumed_run_is_the_uninterrupted_run(llama: Site, whole_run: Any, tmp_path: Path):
    """A run that is cut off after 10 of 20 steps and resumed ends as if it had not been."""
    whole_trainer, whole = whole_run
    saving = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 1}

    with llama.connect(run="resumed") as split:
        trainer = trainer_of(split, tmp_path, **saving)
        stop_after(trainer, 10)
        trainer.train()
    with llama.connect(run="resumed") as split:
        trainer = trainer_of(split, tmp_path, **saving)
        trainer.train(resume_from_checkpoint=True)
        adapter = adapter_of(split)

    expected = [entry["loss"] for entry in logged(whole_trainer) if "loss" in entry]
    assert expected == [entry["loss"] for entry in logged(trainer) if "loss" in entry]
    assert equal(adapter_of(whole), adapter)


def stop_after(trainer: SFTTrainer, steps: int) -> None:
    """Cut a run off after so many steps, its schedule unchanged."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    trainer.add_callback(Stop())


def test_gradient_checkpointing_at_the_server_changes_nothing(
    llama: Site, whole_run: Any, tmp_path: Path
):
    """A trunk that computes its layers again gives the same run."""
    _trainer, whole = whole_run

    with llama.connect(gradient_checkpointing=True) as split:
        trainer_of(split, tmp_path).train()
        adapter = adapter_of(split)

    assert equal(adapter_of(whole), adapter)


def test_bf16_autocast_is_exact(llama: Site, tmp_path: Path):
    """A run under bf16 autocast, which the server is told of, is the unsplit one."""
    whole = llama.unsplit()
    expected = trainer_of(whole, tmp_path / "whole", bf16=True, max_steps=5)
    expected.train()

    with llama.connect() as split:
        found = trainer_of(split, tmp_path / "split", bf16=True, max_steps=5)
        found.train()
        adapter = adapter_of(split)

    assert logged(expected) == logged(found)
    assert equal(adapter_of(whole), adapter)


def test_dropout_is_the_same_from_run_to_run(llama: Site, tmp_path: Path):
    """With dropout on, two runs of one seed are equal, and one without dropout is another."""
    adapters = []
    for number, dropout in enumerate((0.2, 0.2, 0.0)):
        with llama.connect(peft_config=lora(lora_dropout=dropout)) as split:
            trainer_of(split, tmp_path / str(number), max_steps=4).train()
            adapters.append(adapter_of(split))

    same, again, without = adapters
    of_trunk = [name for name in same if ".layers.3." in name]
    assert equal(same, again)
    assert of_trunk
    assert all(not equal(same[name], without[name]) for name in of_trunk)


def test_routers_loss_is_refused_and_a_mixture_without_it_exact(
    folder_of: Any, serve: Any, tmp_path: Path
):
    """TRL adds the balancing loss of all routers by default, and the trunk's are elsewhere."""
    site, config = serve(folder_of("mixtral")), lora(target_modules=["q_proj", "v_proj"])
    without = {"router_aux_loss_coef": 0.0, "max_steps": 3}
    whole = site.unsplit(config)
    trainer_of(whole, tmp_path / "whole", **without).train()

    with site.connect(peft_config=config) as split:
        with pytest.raises(ConfigError, match="router_aux_loss_coef to"):
            trainer_of(split, tmp_path)
        trainer_of(split, tmp_path, **without).train()
        adapter = adapter_of(split)
        with pytest.raises(CannotCut, match="output_router_logits"):
            split(**batch_of(1), output_router_logits=True)
        split.config.output_router_logits = True
        with pytest.raises(CannotCut, match="also of the model's config"):
            split(**batch_of(1))

    assert equal(adapter_of(whole), adapter)


@pytest.mark.parametrize("in_column", [False, True])
def test_a_classifier_in_chunks_is_the_classifier_in_one_piece(
    folder_of: Any, certs: Path, tmp_path: Path, in_column: bool
):
    """A Trainer tells every model how many items a batch has; a classifier's loss is a mean."""
    task = "sequence-classification"
    site = site_of(folder_of("llama", task=task), certs, tmp_path / "state", task=task)
    labels = [[i % 3] if in_column else i % 3 for i in range(8)]
    rows = [{"input_ids": [20 + i, 30 + i, 40], "labels": labels[i]} for i in range(8)]
    logs = []
    for chunks in (1, 2):
        config = lora(task, target_modules=["q_proj", "up_proj"])
        with site.connect(peft_config=config, num_labels=3, chunks=chunks) as split:
            args = settings_of(tmp_path, max_steps=3, per_device_train_batch_size=4)
            trainer = Trainer(
                model=split,
                args=TrainingArguments(
                    **{f.name: getattr(args, f.name) for f in fields(TrainingArguments) if f.init}
                ),
                train_dataset=rows,
                data_collator=lambda few: {k: torch.tensor([r[k] for r in few]) for k in few[0]},
            )
            cutlayer.attach(trainer)
            trainer.train()
            logs.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history[:-1]])
    site.server.stop(grace_s=0.5)

    whole, in_chunks = torch.tensor(logs)
    assert len(whole) == 3
    torch.testing.assert_close(whole, in_chunks, rtol=1e-4, atol=1e-4)


class Interrupt(TrainerCallback):
    """A user's Ctrl-C between the parts of a step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Press it."""
        raise KeyboardInterrupt


def test_an_interrupted_step_is_in_no_later_one(llama: Site, tmp_path: Path):
    """A trainer that is stopped in the middle of a step and begins again begins anew."""

    def trained(model: Any, folder: Path) -> dict[str, Any]:
        trainer = trainer_of(model, folder, max_steps=2, optim="sgd", warmup_steps=0)
        interrupt = Interrupt()
        trainer.add_callback(interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(interrupt)
        trainer.train()
        return adapter_of(model)

    expected = trained(llama.unsplit(), tmp_path / "whole")
    with llama.connect() as split:
        found = trained(split, tmp_path)

    assert equal(expected, found)


def test_a_step_that_is_left_out_clips_nothing_later(llama: Site):
    """Whoever clips, sees too large a norm and drops the gradients begins anew on both sides."""

    def train(model: Any, clip: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        for seed, (most, is_done) in enumerate([(1e-3, False), (1e9, True)]):
            model.train()(**batch_of(seed)).loss.backward()
            clip(model.parameters(), most)
            if is_done:
                optimizer.step()
            optimizer.zero_grad()
        return adapter_of(model)

    def sgd(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    whole = llama.unsplit()
    expected = train(whole, torch.nn.utils.clip_grad_norm_, sgd(whole))
    with llama.connect() as split:
        optimizer = sgd(split)
        found = train(split, cutlayer.attach(optimizer, split).clip_grad_norm_, optimizer)

    assert equal(expected, found)
