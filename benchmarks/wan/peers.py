"""How the field writes a split step, on our model and our link: the whole batch, turn by turn.

Written here from the shape of their loops, not copied; each message is a pickle with its length
before it, and the other side sleeps meanwhile.

    splitlora    FDU-INC/Split_LoRA at a549b60 (2025-02-02), examples/NLG/src/gpt2_ft_sfl.py: the
                 client has the first three blocks; activations *and labels* go to the server, which
                 does forward, loss, backward and its optimizer's step, and sends the activations'
                 gradient back. Theirs runs in one process; here a socket is in between.
    sequential   the client has both ends: activations up, trunk's output down, its gradient up, the
                 activations' gradient down, as in TAP-LLM/SplitFedLLM (2025-11) or VFLAIR-LLM
                 (2026-01). fp32 on the wire, as there.

A server is `peers.py server`, which trains what arrives on its port; a client is a contestant.
"""

from __future__ import annotations

import json
import pickle
import socket
import struct
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import cutlayer
from benchmarks.processes import cpu_seconds
from cutlayer.server.worker import give_memory_back

SPLITLORA_LAYERS = 3
LEARNING_RATE = 1e-4
MAX_NORM = 1.0

_LENGTH = struct.Struct("<Q")
_TURN_IS_OVER = "turn is over"
"""Those who rest keep no memory that others of a run need."""


class Pipe:
    """Objects over a socket, as pickles, counted."""

    def __init__(self, end: socket.socket) -> None:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._end = end
        self.sent_bytes = self.received_bytes = 0
        self.waited_s = 0.0

    def send(self, thing: Any) -> None:
        """Send something and wait until it is under way."""
        data = pickle.dumps(thing)
        self._end.sendall(_LENGTH.pack(len(data)) + data)
        self.sent_bytes += _LENGTH.size + len(data)

    def receive(self) -> Any:
        """Wait for something; `None` if the other side has gone."""
        started_s = time.perf_counter()
        told = self._read(_LENGTH.size)
        if not told:
            return None
        data = self._read(_LENGTH.unpack(told)[0])
        self.waited_s += time.perf_counter() - started_s
        self.received_bytes += _LENGTH.size + len(data)
        return pickle.loads(data)

    def _read(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            piece = self._end.recv(min(nbytes - len(data), 1 << 20))
            if not piece:
                return b""
            data += piece
        return bytes(data)


class Part:
    """Layers of a Llama-like model with their adapters, and an optimizer over these."""

    def __init__(self, workload: dict[str, Any], lora: dict[str, Any], layers: range) -> None:
        model = AutoModelForCausalLM.from_pretrained(workload["model"], dtype=torch.float32)
        rank = workload["rank"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **lora)
        self.whole = get_peft_model(model, config)
        cutlayer.seed_adapter(self.whole, 0)
        self.whole.train()
        self.base = self.whole.get_base_model()
        self.layers = self.base.model.layers
        inside = [n for n, _ in self.whole.named_parameters() if self._is_in(n, layers)]
        self.trained = [
            p for n, p in self.whole.named_parameters() if n in inside and p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE) if self.trained else None

    @staticmethod
    def _is_in(name: str, layers: range) -> bool:
        _, _, rest = name.partition(".layers.")
        return bool(rest) and int(rest.partition(".")[0]) in layers

    def run(self, hidden_BTD: Tensor, layers: range) -> Tensor:
        """Return what these layers make of hidden states."""
        positions_BT = torch.arange(hidden_BTD.shape[1])[None]
        rotary = self.base.model.rotary_emb(hidden_BTD, positions_BT)
        for number in layers:
            hidden_BTD = self.layers[number](
                hidden_BTD, attention_mask=None, position_ids=positions_BT,
                position_embeddings=rotary,
            )  # fmt: skip
        return hidden_BTD

    def loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the loss of the last layer's output."""
        logits = self.base.lm_head(self.base.model.norm(hidden_BTD))
        loss: Tensor = self.base.loss_function(logits, labels_BT, vocab_size=logits.shape[-1])
        return loss

    def step(self) -> None:
        """Clip by this part's own norm, as they do, and step."""
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()


class Peer:
    """The client of a peer, as a contestant that takes turns."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._kind = spec["kind"]
        self._tokens_KBT = load_file(spec["workload"]["tokens"])["tokens"]
        layers = spec["workload"]["num_layers"]
        self._bottom = range(spec["lower"])
        self._top = range(spec["upper"], layers) if self._kind == "sequential" else range(0)
        ours = Part(spec["workload"], spec["lora"], self._top)
        self._part = ours
        self._pipe = Pipe(socket.create_connection(("127.0.0.1", spec["port"])))
        self._done = 0

    def step(self) -> float:
        """Do one step and return its loss."""
        tokens_BT = self._tokens_KBT[self._done % len(self._tokens_KBT)]
        self._done += 1
        part = self._part
        smashed_BTD = part.run(part.base.model.embed_tokens(tokens_BT), self._bottom)
        smashed_BTD = smashed_BTD.detach().requires_grad_(True)
        if self._kind == "splitlora":
            self._pipe.send((smashed_BTD.detach(), tokens_BT))
            loss, _gradient = self._pipe.receive()
            return float(loss)
        self._pipe.send(smashed_BTD.detach())
        out_BTD = self._pipe.receive().requires_grad_(True)
        loss = part.loss(part.run(out_BTD, self._top), tokens_BT)
        loss.backward()
        self._pipe.send(out_BTD.grad)
        self._pipe.receive()
        part.step()
        return float(loss.detach())

    def run(self, *, warm: int, steps: int, server: int = 0) -> dict[str, Any]:
        """Do some steps to warm up, and `steps` that count; see `worker.Contestant.run`."""
        told: dict[str, float] = {}
        first_loss = 0.0
        for number in range(warm + steps + 1):
            if number in (warm, warm + steps):
                counted = {
                    "seconds": time.perf_counter(),
                    "cpu_s": cpu_seconds() + cpu_seconds(server),
                    "trunk_s": cpu_seconds(server),
                    "sent_bytes": float(self._pipe.sent_bytes),
                    "received_bytes": float(self._pipe.received_bytes),
                    "waited_s": self._pipe.waited_s,
                }
                told = {name: value - told.get(name, 0.0) for name, value in counted.items()}
            if number < warm + steps:
                loss = self.step()
                first_loss = first_loss or loss
        self._pipe.send(_TURN_IS_OVER)
        give_memory_back()
        told = {name: value / steps for name, value in told.items()}
        told["compute_s"] = told["seconds"] - told["waited_s"]
        return {**told, "first_loss": first_loss}


def serve(spec: dict[str, Any]) -> None:
    """Be the server of a peer."""
    layers = range(spec["lower"], spec["upper"])
    part = Part(spec["workload"], spec["lora"], layers)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        pipe = Pipe(listener.accept()[0])
        while (told := pipe.receive()) is not None:
            if isinstance(told, str):
                give_memory_back()
                continue
            if spec["kind"] == "splitlora":
                smashed_BTD, labels_BT = told
                smashed_BTD.requires_grad_(True)
                loss = part.loss(part.run(smashed_BTD, layers), labels_BT)
                loss.backward()
                part.step()
                pipe.send((loss.detach(), smashed_BTD.grad))
                continue
            smashed_BTD = told.requires_grad_(True)
            out_BTD = part.run(smashed_BTD, layers)
            pipe.send(out_BTD.detach())
            out_BTD.backward(pipe.receive())
            pipe.send(smashed_BTD.grad)
            part.step()


def main() -> None:
    """Be a server, or answer requests until standard input ends."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    if spec["side"] == "server":
        serve(spec)
        return
    peer = Peer(spec)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(peer, asked.pop("do"))(**asked)), flush=True)


if __name__ == "__main__":
    main()
