"""One contestant in a process of its own: it trains a step, or tells its memory, when asked.

Roles:
    imports   import what a client imports, and do nothing
    loaded    load the whole model
    unsplit   the whole model with peft's LoRA
    full      the whole model, every weight trained
    split     the client of a server

A worker reads one JSON line per request from standard input and answers with one.
"""

# Shapes:  K batches   B batch   T tokens

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import cutlayer

# `connect` and `attach` are imported on first use; so the bare process holds them too.
import cutlayer.client.connect
import cutlayer.client.training
from benchmarks.processes import cpu_seconds, memory_bytes
from cutlayer.server.worker import give_memory_back
from cutlayer.wire import cutlayer_pb2 as pb

LEARNING_RATE = 1e-4
MAX_NORM = 1.0


@dataclass
class Stopwatch:
    """Say where a split step's seconds go, by the calls that leave and enter the client's parts.

    Between two calls the client computes: what ends in sending activations is bottom, what ends
    in sending a gradient is top, what follows an arrival belongs to the part that awaited it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _mark_s: float = 0.0
    _verb_of: dict[int, str] = field(default_factory=dict)
    _arrived: str = ""

    def watch(self, connection: Any) -> None:
        """Time the requests and the waits of a connection."""
        request, await_reply = connection.request, connection.await_reply
        wait_any = connection.wait_any

        def timed_request(head: pb.Head, *args: Any, **kwargs: Any) -> Any:
            verb = head.WhichOneof("verb")
            self.until({"forward": "bottom", "backward": "top"}.get(verb, "optimizer"))
            pending = request(head, *args, **kwargs)
            self._verb_of[pending.sequence] = verb
            self.until("sending")
            return pending

        def until_the_wait() -> None:
            self.until({"forward": "top", "backward": "bottom"}.get(self._arrived, "top"))

        def timed_wait_any(pendings: Any) -> None:
            until_the_wait()
            wait_any(pendings)
            self.until("waiting")

        def timed_await(pending: Any) -> Any:
            until_the_wait()
            tensors = await_reply(pending)
            self._arrived = self._verb_of.get(pending.sequence, "")
            self.until("waiting")
            return tensors

        connection.request, connection.await_reply = timed_request, timed_await
        connection.wait_any = timed_wait_any

    def start(self) -> None:
        """Begin a step."""
        self.seconds, self._arrived, self._mark_s = {}, "", time.perf_counter()

    def until(self, part: str) -> None:
        """Count the seconds since the last mark to a part."""
        now_s = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now_s - self._mark_s
        self._mark_s = now_s


class Contestant:
    """A model in training; `step` does one step of plain PyTorch."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.workload = spec["workload"]
        self.tokens_KBT = load_file(self.workload["tokens"])["tokens"]
        self.done = 0
        self.watch = Stopwatch()
        self.model: Any = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.clip: Callable[..., Tensor] = torch.nn.utils.clip_grad_norm_
        getattr(self, f"_make_{spec['role']}")()

    def _make_imports(self) -> None:
        pass

    def _make_loaded(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            self.workload["model"], dtype=torch.float32
        )

    def _make_full(self) -> None:
        self._make_loaded()
        self._train()

    def _make_unsplit(self) -> None:
        self._make_loaded()
        self.model = get_peft_model(self.model, self._lora())
        cutlayer.seed_adapter(self.model, 0)
        self._train()

    def _make_split(self) -> None:
        certificates = self.spec["certificates"]
        self.model = cutlayer.connect(
            self.workload["model"],
            server=self.spec["server"],
            ca=certificates["ca"],
            cert=certificates["cert"],
            key=certificates["key"],
            bottom_layers=self.spec["bottom_layers"],
            top_layers=self.spec["top_layers"],
            codec=self.spec.get("codec", "raw"),
            send_once=self.spec.get("send_once", False),
            chunks=self.spec.get("chunks", 1),
            lean_head=self.spec.get("lean_head", False),
            quantization=self.spec.get("quantization", ""),
            gradient_checkpointing=self.spec.get("gradient_checkpointing", False),
            train=self.spec.get("train", ("bottom", "trunk", "top")),
            peft_config=self._lora(),
        )
        self.gradient_bytes = 0
        self._count_gradients()
        if self.spec.get("breakdown"):
            self.watch.watch(self.model.connection)
        self._train()
        assert self.optimizer is not None
        self.clip = cutlayer.attach(self.optimizer, self.model).clip_grad_norm_

    def _lora(self) -> LoraConfig:
        rank = self.workload["rank"]
        given: dict[str, Any] = {"target_modules": "all-linear", **self.spec.get("lora", {})}
        return LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **given)

    def _train(self) -> None:
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    # ------------------------------------------------------------------ what can be asked

    def batch(self, after: int = 0) -> dict[str, Tensor]:
        """Return the next batch, or one so many `after` it, as a collator gives it."""
        epoch, number = divmod(self.done + after, len(self.tokens_KBT))
        tokens_KBT = self.tokens_KBT
        if self.spec.get("shuffled"):  # row by row, into other batches in each epoch
            order = torch.randperm(
                tokens_KBT.shape[0] * tokens_KBT.shape[1],
                generator=torch.Generator().manual_seed(epoch),
            )
            tokens_KBT = tokens_KBT.flatten(0, 1)[order].view_as(tokens_KBT)
        tokens_BT = tokens_KBT[number]
        return {
            "input_ids": tokens_BT,
            "attention_mask": torch.ones_like(tokens_BT),
            "labels": tokens_BT,
        }

    def step(self, *, threads: int = 0, chunks: int = 0) -> dict[str, Any]:
        """Do one training step, the trunk's optimizer included, and say what it took."""
        if threads:
            torch.set_num_threads(threads)
        if chunks:
            self.model.chunks = chunks
        batch = self.batch()
        traffic = getattr(getattr(self.model, "connection", None), "traffic", None)
        before = vars(traffic).copy() if traffic else {}
        cpu_s = cpu_seconds()
        started_s = time.perf_counter()
        self.watch.start()
        loss = self.model(**batch, use_cache=False).loss
        self.watch.until("top")
        loss.backward()
        self.watch.until("bottom")
        self._finish()
        self.watch.until("optimizer")
        seconds = time.perf_counter() - started_s
        self.done += 1
        after = vars(traffic) if traffic else {}
        return {
            "seconds": seconds,
            "cpu_s": cpu_seconds() - cpu_s,
            "loss": float(loss.detach()),
            "parts": self.watch.seconds,
            "traffic": {name: after[name] - before[name] for name in before},
        }

    def run(
        self, *, warm: int, steps: int, server: int = 0, threads: int = 0, chunks: int = 0
    ) -> dict[str, Any]:
        """Do some steps to warm up and then `steps`, one after the other as a trainer does.

        Nothing but the gradients is waited for between two steps: the trunk's optimizer steps while
        we go on. A step's time is from the end of the one before it.

        Returns:
            By step: seconds, CPU seconds of this process and of that with the number `server`,
            `compute_s` (our own, waits left out), and what went over the link.
        """
        if threads:
            torch.set_num_threads(threads)
        if chunks:
            self.model.chunks = chunks
        traffic = getattr(getattr(self.model, "connection", None), "traffic", None)
        told: dict[str, float] = {}
        first_loss = 0.0
        for number in range(warm + steps + 1):
            if number in (warm, warm + steps):
                theirs_s = cpu_seconds(server) if server else 0.0
                counted = {"seconds": time.perf_counter(), "cpu_s": cpu_seconds() + theirs_s}
                counted |= vars(traffic) if traffic else {}
                told = {name: value - told.get(name, 0.0) for name, value in counted.items()}
            if number < warm + steps:
                if traffic:
                    self.model.comes(self.batch(after=1))  # `attach` does so for a trainer
                loss = self.model(**self.batch(), use_cache=False).loss
                first_loss = first_loss or float(loss.detach())
                loss.backward()
                self._finish(wait=False)
                self.done += 1
        if traffic:
            self.model.connection.request(pb.Head(zero_grad=pb.ZeroGrad())).wait()
        give_memory_back()  # others have their turn now
        told = {name: value / steps for name, value in told.items()}
        told["compute_s"] = told["seconds"] - told.get("waited_s", 0.0)
        return {**told, "first_loss": first_loss}

    def _finish(self, *, wait: bool = True) -> None:
        assert self.optimizer is not None
        self.clip(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.spec["role"] == "split" and wait:
            # Requests keep their order: this answer says that the trunk has stepped.
            self.model.connection.request(pb.Head(zero_grad=pb.ZeroGrad())).wait()

    def payload(self, *, steps: int) -> dict[str, Any]:
        """Do some steps and return the bytes of the tensors that crossed in them, as encoded."""
        counted = [0]
        connection = self.model.connection
        request, deliver = connection.request, connection._deliver

        def of(head: pb.Head) -> int:
            return sum(meta.nbytes for meta in head.tensors)

        def counting_request(head: pb.Head, *args: Any, **kwargs: Any) -> Any:
            pending = request(head, *args, **kwargs)
            counted[0] += of(head)
            return pending

        def counting_deliver(message: Any, *args: Any) -> Any:
            counted[0] += of(message.head)
            return deliver(message, *args)

        connection.request, connection._deliver = counting_request, counting_deliver
        self.run(warm=0, steps=steps)
        connection.request, connection._deliver = request, deliver
        return {"payload_bytes": counted[0]}

    def rows(self) -> dict[str, Any]:
        """Return what was sent once so far, and the bytes by which a row is named."""
        once = self.model.by_rows.once
        named = pb.Forward(rows=[bytes(32)]).ByteSize()
        return {**once.counts(), "bytes_per_name": named, "gradient_bytes": self.gradient_bytes}

    def _count_gradients(self) -> None:
        """Count the bytes of gradients of activations that come down."""
        deliver = self.model.connection._deliver

        def counted(message: Any, outgoing: Any) -> None:
            metas = message.head.tensors
            self.gradient_bytes += sum(m.nbytes for m in metas if m.name == "gradient")
            deliver(message, outgoing)

        self.model.connection._deliver = counted

    def backward_only(self) -> dict[str, Any]:
        """Leave accumulated gradients on both sides, as gradient accumulation does."""
        self.model(**self.batch(), use_cache=False).loss.backward()
        return {}

    def memory(self) -> dict[str, Any]:
        """Return this process's resident bytes, now and at most."""
        return dict(memory_bytes())

    def account(self) -> dict[str, Any]:
        """Count the bytes of parameters, of training state, of activations and of logits.

        Activations are the storages that autograd keeps at the end of a forward, each once,
        parameters left out.
        """
        held = {_storage(t): t.untyped_storage().nbytes() for t in _tensors_of(self.model)}
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in held:
                saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = self.model(**self.batch(), use_cache=False)
        saved.pop(_storage(output.logits), None)
        counted = {
            "weights": sum(held.values()),
            "training_state": 3 * trained,
            "activations": sum(saved.values()),
            "logits": output.logits.nbytes,
        }
        output.loss.backward()
        self._finish()
        return counted

    def adapter_bytes(self) -> dict[str, Any]:
        """Return the bytes of the trunk's half of the adapter."""
        return {
            "bytes": sum(
                4 * torch.Size(shape).numel() for shape in self.model.connection.parameters.values()
            )
        }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def main() -> None:
    """Answer requests until standard input ends."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    contestant = Contestant(spec)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = getattr(contestant, asked.pop("do"))(**asked)
        print(json.dumps(answer), flush=True)
    if spec["role"] == "split":
        contestant.model.close()


if __name__ == "__main__":
    main()
