"""A client's whole run, as a user's script has it; started again after every kill."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import cutlayer


class Told(TrainerCallback):
    """Say each step when it is done."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Print one line of JSON."""
        print(json.dumps({"step": state.global_step, "at_s": time.monotonic()}), flush=True)


def main() -> None:
    """Train to the end from wherever both sides stand."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    set_seed(1)
    rows = load_file(spec["tokens"])["tokens"].flatten(0, 1)
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        output_dir=spec["out"],
        max_steps=spec["steps"],
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=10,
        save_steps=2,
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with cutlayer.connect(
        spec["model"],
        server=spec["server"],
        bottom_layers=2,
        top_layers=2,
        peft_config=lora,
        ca=spec["ca"],
        cert=spec["cert"],
        key=spec["key"],
        run="chaos",
        chunks=2,
        idle_timeout_s=5.0,
    ) as model:
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[Told()])
        cutlayer.attach(trainer)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model(str(Path(spec["out"]) / "adapter"))
    print(json.dumps({"finished": True, "at_s": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main()
