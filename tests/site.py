"""A served trunk, the client's way to it, and the unsplit model to compare with."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import cutlayer
from cutlayer.server.access import server_credentials
from cutlayer.server.app import Server, make_server
from cutlayer.split.adapters import seed_adapter

AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


@dataclass(frozen=True)
class Site:
    """A server in this process or in its own, over real TLS on 127.0.0.1."""

    folder: Path
    certs: Path
    server: Server | ServerProcess
    task: str = "causal-lm"

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.server.port}"

    def connect(self, **settings: Any) -> Any:
        """Connect as a client would."""
        asked = {
            "server": self.address,
            "bottom_layers": 2,
            "top_layers": 1,
            "task": self.task,
            "peft_config": lora(self.task),
            "ca": self.certs / "ca.pem",
            "connect_timeout_s": 10.0,
        }
        return cutlayer.connect(str(self.folder), **{**asked, **settings})

    def unsplit(self, config: LoraConfig | None = None, *, seed: int = 0, **settings: Any) -> Any:
        """Return the ordinary PeftModel that starts where a split run starts."""
        return unsplit(
            self.folder, config or lora(self.task), task=self.task, seed=seed, **settings
        )


def site_of(folder: Path, certs: Path, state_dir: Path, **settings: Any) -> Site:
    """Serve a folder."""
    client_ca = settings.pop("client_ca", None)
    credentials = server_credentials(certs / "server.pem", certs / "server.key", client_ca)
    asked = {"bottom_layers": 1, "top_layers": 1, "host": "127.0.0.1", "port": 0}
    server = make_server(
        str(folder), credentials=credentials, state_dir=state_dir, **{**asked, **settings}
    )
    return Site(folder, certs, server, settings.get("task", "causal-lm"))


class ServerProcess:
    """`cutlayer serve` as an operator runs it."""

    def __init__(
        self,
        folder: Path,
        certs: Path,
        state_dir: Path,
        *,
        log: IO[bytes] | int = subprocess.DEVNULL,
        **flags: Any,
    ) -> None:
        asked = {"split_bottom_layers": 1, "split_top_layers": 1, "host": "127.0.0.1", "port": 0}
        asked |= {"certs": certs, "state_dir": state_dir, "threads": 1, **flags}
        words = [f"--{k}" if v is True else f"--{k}={v}" for k, v in asked.items()]
        command = [sys.executable, "-m", "cutlayer.cli.main", "serve"]
        self.process = subprocess.Popen(
            [*command, "--model_name_or_path", str(folder), *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert self.process.stdout is not None
        self.metrics = ""
        for line in self.process.stdout:
            if line.startswith("metrics"):
                self.metrics = line.split()[-1]
            if found := re.search(r" at 127\.0\.0\.1:(\d+) ", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("the server did not start")

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)

    def kill(self) -> None:
        """End it without a warning."""
        self.process.kill()
        self.process.wait(timeout=30)


def lora(task: str = "causal-lm", **settings: Any) -> LoraConfig:
    """Return a LoRA without neutral numbers and without dropout."""
    asked = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "lora_dropout": 0.0}
    return LoraConfig(task_type=PEFT_TASKS[task], **{**asked, **settings})


def unsplit(
    folder: Path, config: LoraConfig, *, task: str = "causal-lm", seed: int = 0, **settings: Any
) -> Any:
    """Return the whole model with the LoRA and the start of a split run."""
    model = get_peft_model(AUTO[task].from_pretrained(folder, **settings), config)
    seed_adapter(model, seed)
    return model


def batch_of(seed: int, *, rows: int = 4, tokens: int = 11) -> dict[str, Tensor]:
    """Return a batch whose second row is padded at the right and its third at the left."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(12, 80, (rows, tokens), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, -3:] = 0
    if rows > 2:
        mask_BT[2, :2] = 0
    ids_BT = ids_BT.masked_fill(mask_BT == 0, 0)
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


@dataclass
class Loop:
    """A plain PyTorch loop, the same for a split and an unsplit model."""

    model: Any
    optimizer: torch.optim.Optimizer
    clip: Any

    @classmethod
    def over(
        cls, model: Any, *, lr: float = 1e-2, kind: Any = torch.optim.AdamW, **settings: Any
    ) -> Loop:
        """Return a loop with a fresh optimizer; a split model's trunk follows it."""
        trained = [p for p in model.parameters() if p.requires_grad]
        # As one group, since a client may train nothing of its own: torch refuses an empty list.
        optimizer = kind([{"params": trained}], lr=lr, **settings)
        clip = torch.nn.utils.clip_grad_norm_
        if hasattr(model, "remote_trunk"):
            clip = cutlayer.attach(optimizer, model).clip_grad_norm_
        return cls(model.train(), optimizer, clip)

    def step(self, *batches: dict[str, Tensor], max_norm: float = 0.05) -> list[Tensor]:
        """Accumulate the batches, clip so that it bites, step; return losses, logits and norm."""
        seen = []
        for batch in batches:
            output = self.model(**batch)
            (output.loss / len(batches)).backward()
            seen += [output.loss.detach(), output.logits.detach()]
        seen.append(self.clip(self.model.parameters(), max_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return seen


def adapter_of(model: Any) -> dict[str, Tensor]:
    """Return the whole adapter of a split or an unsplit model."""
    if hasattr(model, "whole_adapter"):
        return {name: tensor.clone() for name, tensor in model.whole_adapter().items()}
    return {name: t.detach().clone() for name, t in get_peft_model_state_dict(model).items()}


def equal(expected: Any, found: Any) -> bool:
    """Say whether two tensors, lists or dicts of tensors are the same bit for bit."""
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(
            equal(expected[k], found[k]) for k in expected
        )
    if isinstance(expected, list | tuple):
        return len(expected) == len(found) and all(map(equal, expected, found))
    return bool(torch.equal(expected, found))
