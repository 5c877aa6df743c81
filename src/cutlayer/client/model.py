"""`connect`: the ordinary Hugging Face model whose trunk is elsewhere."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import PreTrainedModel

from cutlayer.client.address import Address
from cutlayer.client.checkpoint import read_adapter, write_adapter
from cutlayer.client.chunks import joined, rows_in, rows_of, spans, weight_of
from cutlayer.client.connection import Connection
from cutlayer.client.departures import Departures, defend_embedding
from cutlayer.client.handshake import agreement_of, check_adapter, check_parameters, spec_of
from cutlayer.client.link import TrunkLink
from cutlayer.client.pipeline import Objective, run_by_arrival
from cutlayer.client.remote_trunk import RemoteTrunk, chunks_sent
from cutlayer.errors import ConfigError, Refused
from cutlayer.privacy.defenses import Defense
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.transcript import TranscriptWriter
from cutlayer.split.adapters import (
    ADAPTER,
    PARTS,
    AdapterPlan,
    TrunkLora,
    adapter_state,
    ends_config,
    plan_adapter,
    seed_adapter,
    union,
)
from cutlayer.split.cut import Anatomy, Cut, bottom_bypassed
from cutlayer.split.entry import watch_entry
from cutlayer.split.loading import Skeleton, load_ends, open_checkpoint, skeleton_of
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.codecs import CODECS
from cutlayer.wire.tensors import DTYPES

__all__ = ["SplitModel", "connect"]


class SplitModel:
    """What a connected model has besides being a PeftModel: its trunk, and how to save it whole.

    Attributes:
        connection: The session with the server.
        remote_trunk: The module that stands for the trunk.
        plan: The whole model's adapter and how it falls into parts.
        chunks: Into how many micro-chunks a training batch is cut.
        objective: What a trainer makes of TRL's head, if `attach` knows it.
    """

    connection: Connection
    remote_trunk: RemoteTrunk
    plan: AdapterPlan
    anatomy: Anatomy
    cut: Cut
    chunks: int = 1
    objective: Objective | None = None
    keeps_adapter: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; a training batch goes in micro-chunks if `chunks` is more than one.

        The trunk works on one chunk while we work on another. The loss is that of the whole batch,
        each token weighing the same. If the model is given labels, each chunk's backward is done
        as soon as its loss is there (`pipeline.run_by_arrival`); else at `loss.backward()`.
        """
        rows = rows_in(kwargs)
        whole = self.chunks == 1 or args or rows < 2 or kwargs.get("past_key_values") is not None
        if whole or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        parts = [rows_of(kwargs, rows, span) for span in spans(rows, self.chunks)]
        run = super().forward  # type: ignore[misc]
        top_only = functools.partial(bottom_bypassed, self.hf_model, self.anatomy, self.cut)
        objective = self._objective(kwargs)
        trained = [p for p in self.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        if objective and (trained or self.remote_trunk.trains):
            return run_by_arrival(
                run, parts, self.remote_trunk, trained, objective=objective, top_only=top_only
            )
        on_their_way = chunks_sent(
            self.remote_trunk, [functools.partial(run, **part) for part in parts]
        )
        outputs = []
        for part, sent in zip(parts, on_their_way, strict=True):
            with self.remote_trunk.receiving(sent), top_only():
                outputs.append(run(**part))
        loss_is_mean = kwargs.get("num_items_in_batch") is None
        return joined(outputs, [weight_of(part) for part in parts], loss_is_mean=loss_is_mean)

    def _objective(self, kwargs: dict[str, Any]) -> Objective | None:
        """Return what the loss of this call will be made of, `None` if that is not known."""
        labels = kwargs.get("labels", kwargs.get("shift_labels"))
        if labels is None or not self.training or not weight_of(kwargs):  # type: ignore[attr-defined]
            return None
        # TRL's head gives log-probabilities, of which its trainer makes the loss.
        return self.objective if kwargs.get("fused_lm_head") else Objective()

    @property
    def hf_model(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        model: PreTrainedModel = self.get_base_model()  # type: ignore[attr-defined]
        return model

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model while open, on both sides."""
        was, self.remote_trunk.adapter_disabled = self.remote_trunk.adapter_disabled, True
        try:
            with super().disable_adapter():  # type: ignore[misc]
                yield
        finally:
            self.remote_trunk.adapter_disabled = was

    def whole_adapter(self) -> dict[str, Tensor]:
        """Return the whole model's adapter: our half, and the trunk's from the server.

        Raises:
            Refused: If the server keeps its half.
        """
        head = pb.Head(export_adapter=pb.ExportAdapter())
        trunk = self.connection.request(head).wait() if self.plan.trunk.targets else {}
        check_adapter(trunk, self.plan)
        return union(self.own_adapter(), trunk)

    def own_adapter(self) -> dict[str, Tensor]:
        """Return the client's half of the adapter."""
        return adapter_state(self) if self.plan.client_parameters else {}  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | Path, **_kwargs: Any) -> None:
        """Write the whole adapter as one ordinary PEFT folder, or nothing.

        If the server keeps the trunk's half, ours alone is written, with a note that says so.

        Raises:
            StorageError: If the disk says no; what stood there before is untouched.
        """
        state = self.own_adapter() if self.keeps_adapter else self.whole_adapter()
        write_adapter(Path(save_directory), state, self.plan.config, partial=self.keeps_adapter)

    def load_adapter(self, model_id: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Take up an adapter on both sides, or let peft load one of another name on ours."""
        name = args[0] if args else kwargs.get("adapter_name", ADAPTER)
        if name != ADAPTER:
            raise ConfigError(f"a split model has one adapter, '{ADAPTER}': '{name}' was asked for")
        self.take_up(Path(model_id))

    def take_up(self, folder: Path) -> None:
        """Load an adapter folder into both halves.

        Raises:
            ModelError: If the folder is no adapter.
            Refused: If it does not fit the LoRA of this session.
        """
        state = read_adapter(folder)
        mine = self.own_adapter()
        if mine.keys() - state.keys():
            raise Refused(f"adapter '{folder}' lacks {sorted(mine.keys() - state.keys())[0]}")
        set_peft_model_state_dict(self, {name: state[name] for name in mine}, adapter_name=ADAPTER)
        trunk = {name: tensor for name, tensor in state.items() if name not in mine}
        if trunk:
            self.connection.request(pb.Head(import_adapter=pb.ImportAdapter()), trunk).wait()

    def close(self) -> None:
        """Give the session back, and let another process have the ledger."""
        self.connection.close()
        ledger = self.remote_trunk.departures.ledger
        if ledger is not None:
            ledger.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class SplitModelForCausalLM(SplitModel, PeftModelForCausalLM):
    """A causal language model whose trunk is elsewhere."""


class SplitModelForSequenceClassification(SplitModel, PeftModelForSequenceClassification):
    """A sequence classifier whose trunk is elsewhere."""


_CLASSES: dict[str, type[Any]] = {
    "causal-lm": SplitModelForCausalLM,
    "sequence-classification": SplitModelForSequenceClassification,
}


def connect(
    model: str,
    *,
    server: str,
    bottom_layers: int,
    top_layers: int,
    peft_config: PeftConfig | None = None,
    train: Iterable[str] = PARTS,
    task: str = "causal-lm",
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    ca: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    token_file: str | Path | None = None,
    token: str | None = None,
    plaintext: bool = False,
    attestation_policy: str | Path | None = None,
    codec: str = "raw",
    chunks: int = 1,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    run: str | None = None,
    take_up: bool = False,
    connect_timeout_s: float = 30.0,
    idle_timeout_s: float = 120.0,
    lease_s: float = 600.0,
    defenses: Sequence[Defense] = (),
    ledger: Ledger | None = None,
    transcript: TranscriptWriter | None = None,
    **config_overrides: Any,
) -> Any:
    """Return an ordinary PEFT model whose trunk runs at a server.

    It holds the embedding, `bottom_layers` first and `top_layers` last layers, the norm and the
    head; the layers between are never downloaded or held here (of a model in one file, the first
    rows of their tensors are read and compared with the server's: decision 0009). TRL's and
    transformers' trainers, `generate` and a plain loop take it as it is; see `attach` for the
    optimizer.

    Args:
        model: A folder or a hub id, as for `from_pretrained`.
        server: `host:port` of a `cutlayer serve`.
        bottom_layers: Number of first layers that stay here.
        top_layers: Number of last layers that stay here.
        peft_config: The LoRA of the whole model; `None` only runs the base model.
        train: Which parts the LoRA is on: any of `bottom`, `trunk`, `top`.
        task: `causal-lm` or `sequence-classification`.
        revision: The model's revision on the hub.
        dtype: dtype of the base weights, the same at the server.
        attn_implementation: `eager`, `sdpa`, …; transformers' own choice by default.
        ca: The authority that signed the server's certificate.
        cert: Our certificate, for mutual TLS.
        key: The key of our certificate.
        token_file: Holds the bearer token by which the server knows us.
        token: The token itself, in place of its file.
        plaintext: Use no TLS: everybody on the way reads what is sent.
        attestation_policy: What the server must prove before anything is sent to it, a JSON file.
        codec: How activations and gradients are written; `raw` is bit-exact.
        chunks: Into how many micro-chunks a training batch is cut; 1 is bit-exact.
        gradient_checkpointing: Let the trunk keep layer inputs only and compute the rest again.
        seed: Seed of the LoRA's start and of the trunk's dropout.
        run: A name for this run at the server; a random one by default.
        take_up: Take up the adapter that the server kept under `run`.
        connect_timeout_s: Seconds to reach the server.
        idle_timeout_s: Seconds without a byte after which the link is taken for dead.
        lease_s: Seconds for which a server that went away is tried again.
        defenses: What is done to what leaves, from `cutlayer.privacy.defenses`.
        ledger: Where releases of formal defenses are booked; they need one.
        transcript: Where some of what leaves is kept at the client, for `cutlayer audit`.
        config_overrides: Set on the model's config (`num_labels`, …).

    Raises:
        ConfigError: If an argument is wrong.
        CannotCut: If this model cannot be cut there.
        ModelError: If the model cannot be found or loaded.
        ConnectionFailed: If the server cannot be reached or trusted.
        AttestationFailed: If it does not prove what the policy asks for; nothing was sent.
        Refused: If the two sides do not hold the same model, or the server says no.
    """
    _check(codec, chunks, dtype)
    if ledger is None and any(defense.formal for defense in defenses):
        raise ConfigError("a defense with a guarantee needs a ledger that books what leaves")
    checkpoint = open_checkpoint(model, revision=revision)
    for name, value in config_overrides.items():
        setattr(checkpoint.config, name, value)
    skeleton = skeleton_of(checkpoint.config, task)
    layers = skeleton.anatomy.num_layers
    cut = Cut.leaving(bottom_layers=bottom_layers, top_layers=top_layers, num_layers=layers)
    plan = _plan(skeleton, peft_config, cut, train, seed, model)
    connection = Connection(
        Address.of(server, ca, cert, key, token_file, token, plaintext, attestation_policy),
        connect_timeout_s=connect_timeout_s,
        idle_timeout_s=idle_timeout_s,
        lease_s=lease_s,
    )
    try:
        remote = RemoteTrunk(skeleton.anatomy, cut.lower, seed=seed)
        settings: dict[str, Any] = {}
        if attn_implementation:
            settings["attn_implementation"] = attn_implementation
        settings |= {"config": checkpoint.config, "dtype": DTYPES[dtype]}
        ends = load_ends(checkpoint, skeleton, cut, remote, **settings)
        agreement = agreement_of(checkpoint, skeleton, cut, task, dtype, ends)
        asked = pb.OpenSessionRequest(
            agreement=agreement,
            lora=spec_of(plan),
            run=run or f"run-{uuid.uuid4().hex[:12]}",
            codec=codec,
            gradient_checkpointing=gradient_checkpointing,
            take_up=take_up,
        )
        reply = connection.open(asked)
        check_parameters(plan, connection)
    except BaseException:
        connection.close()
        raise
    remote.entry = watch_entry(ends, skeleton.anatomy)
    remote.link = TrunkLink(connection, codec=codec)
    remote.trains = bool(plan.trunk.targets)
    remote.departures = Departures(defenses, ledger, transcript, codec)
    defend_embedding(ends, defenses)
    return _wrapped(ends, plan, task, connection, remote, skeleton.anatomy, cut, chunks, reply)


def _check(codec: str, chunks: int, dtype: str) -> None:
    faults = []
    if codec not in CODECS:
        faults.append(f"codec '{codec}' is unknown: one of {', '.join(CODECS)}")
    if chunks < 1:
        faults.append(f"chunks={chunks} must be at least 1")
    if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
        faults.append(f"dtype '{dtype}' is unknown: float32, bfloat16 or float16")
    if faults:
        raise ConfigError("; ".join(faults))


def _plan(
    skeleton: Skeleton,
    config: PeftConfig | None,
    cut: Cut,
    train: Iterable[str],
    seed: int,
    name: str,
) -> AdapterPlan:
    if config is not None:
        plan = plan_adapter(skeleton, config, cut, train=train, seed=seed)
        plan.config.base_model_name_or_path = name
        return plan
    return AdapterPlan(LoraConfig(), TrunkLora((), seed=seed), {}, {})


def _wrapped(
    ends: PreTrainedModel,
    plan: AdapterPlan,
    task: str,
    connection: Connection,
    remote: RemoteTrunk,
    anatomy: Anatomy,
    cut: Cut,
    chunks: int,
    reply: pb.OpenSessionReply,
) -> Any:
    ends.requires_grad_(False)
    model = _CLASSES[task](ends, ends_config(plan), ADAPTER)
    seed_adapter(model, remote.seed)
    model.connection, model.remote_trunk, model.plan = connection, remote, plan
    model.anatomy, model.cut, model.chunks = anatomy, cut, chunks
    model.keeps_adapter = reply.keeps_adapter
    return model
