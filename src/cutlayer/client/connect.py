"""`connect`: an ordinary Hugging Face model whose trunk is elsewhere."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig, PeftConfig

from cutlayer.client.address import Address
from cutlayer.client.ahead import Ahead
from cutlayer.client.by_rows import arrange_rows, begin_send_once
from cutlayer.client.connection import Connection
from cutlayer.client.departures import Departures, defend_embedding
from cutlayer.client.handshake import agreement_of, check_parameters, spec_of
from cutlayer.client.head import LeanHead
from cutlayer.client.link import TrunkLink
from cutlayer.client.model import SplitModelForCausalLM, SplitModelForSequenceClassification
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.tuning import chunks_or_tuning
from cutlayer.errors import ConfigError
from cutlayer.privacy.defenses import Defense, check_together
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.transcript import TranscriptWriter
from cutlayer.split.adapters import (
    ADAPTER,
    PARTS,
    AdapterPlan,
    TrunkLora,
    ends_config,
    plan_adapter,
    seed_adapter,
)
from cutlayer.split.cut import Cut
from cutlayer.split.entry import watch_entry
from cutlayer.split.loading import Checkpoint, Skeleton, load_ends, open_checkpoint, skeleton_of
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.codecs import codec_faults, codecs_of
from cutlayer.wire.tensors import DTYPES

__all__ = ["connect"]

_Made = TypeVar("_Made")
_BUILDING = threading.Lock()

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
    quantization: str = "",
    ca: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    token_file: str | Path | None = None,
    token: str | None = None,
    plaintext: bool = False,
    attestation_policy: str | Path | None = None,
    codec: str | Mapping[str, str] = "raw",
    chunks: int | str = 1,
    lean_head: bool = False,
    send_once: bool | str | Path = False,
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
        quantization: How the server's trunk is stored, `int8`, `float8` or `nf4`; none by default.
        ca: The authority that signed the server's certificate.
        cert: Our certificate, for mutual TLS.
        key: The key of our certificate.
        token_file: Holds the bearer token by which the server knows us.
        token: The token itself, in place of its file.
        plaintext: Use no TLS: everybody on the way reads what is sent.
        attestation_policy: What the server must prove before anything is sent to it, a JSON file.
        codec: How activations and gradients are written, one name or names by `DEPARTURES` of
            wire/codecs.py; `raw` is bit-exact.
        chunks: Micro-chunks of a training batch; 1 is bit-exact, `auto` finds the best number.
        lean_head: Run the LM head at labelled positions only, in tiles; exact up to rounding.
        send_once: Have the server keep the activations of each row, so that later epochs name it:
            a copy for as long as the server says, sealed by a key that it has while we are
            connected. The bottom must be frozen. Give a folder in place of `True` and the key and
            our own copies are there, so that a resumed run finds its rows.
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
    codecs = _checked(codecs_of(codec), chunks, dtype, lean_head and task)
    _check_books(defenses, ledger)
    checkpoint, skeleton = _alone(_opened, model, revision, task, config_overrides)
    layers = skeleton.anatomy.num_layers
    cut = Cut.leaving(bottom_layers=bottom_layers, top_layers=top_layers, num_layers=layers)
    plan = _alone(_plan, skeleton, peft_config, cut, train, seed, model)
    connection = Connection(
        Address.of(server, ca, cert, key, token_file, token, plaintext, attestation_policy),
        connect_timeout_s=connect_timeout_s,
        idle_timeout_s=idle_timeout_s,
        lease_s=lease_s,
    )
    try:
        remote = RemoteTrunk(skeleton.anatomy, cut.lower, seed=seed)
        attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
        settings = {"config": checkpoint.config, "dtype": DTYPES[dtype], **attention}
        ends = _alone(load_ends, checkpoint, skeleton, cut, remote, **settings)
        held = {"task": task, "dtype": dtype, "quantization": quantization, "ends": ends}
        begin_send_once(connection, defenses, send_once)
        asked = pb.OpenSessionRequest(
            agreement=agreement_of(checkpoint, skeleton, cut, **held),
            lora=spec_of(plan),
            run=run or f"run-{uuid.uuid4().hex[:12]}",
            codecs=codecs,
            gradient_checkpointing=gradient_checkpointing,
            take_up=take_up,
        )
        reply = connection.open(asked)
        check_parameters(plan, connection)
        remote.entry, remote.trains = watch_entry(ends, skeleton.anatomy), bool(plan.trunk.targets)
        remote.link = link = TrunkLink(connection, codecs=codecs)
        remote.departures = Departures(defenses, ledger, transcript, link.as_it_arrives)
        defend_embedding(ends, defenses)
        split = _alone(_CLASSES[task], ends.requires_grad_(False), ends_config(plan), ADAPTER)
        seed_adapter(split, seed)
        split.connection, split.remote_trunk, split.plan = connection, remote, plan
        split.anatomy, split.cut, split.keeps_adapter = skeleton.anatomy, cut, reply.keeps_adapter
        split.chunks, split.tuning = chunks_or_tuning(chunks, connection)
        split.lean_head = LeanHead(ends, remote, skeleton.anatomy, cut) if lean_head else None
        split.ahead = arrange_rows(split, asked) or Ahead(remote)
        return split
    except BaseException:
        connection.close()
        raise


def _alone(build: Callable[..., _Made], *args: Any, **settings: Any) -> _Made:
    """Build while nobody else does: peft and transformers patch torch for all threads meanwhile."""
    with _BUILDING:
        return build(*args, **settings)


def _check_books(defenses: Sequence[Defense], ledger: Ledger | None) -> None:
    check_together(defenses)
    if ledger is None and any(defense.formal for defense in defenses):
        raise ConfigError("a defense with a guarantee needs a ledger that books what leaves")


def _checked(
    codecs: dict[str, str], chunks: int | str, dtype: str, lean_head_of: str | bool
) -> dict[str, str]:
    faults = codec_faults(codecs)
    if lean_head_of not in (False, "causal-lm"):
        faults.append(f"lean_head is for a causal-lm: the head of '{lean_head_of}' is small")
    if chunks != "auto" and (isinstance(chunks, str) or chunks < 1):
        faults.append(f"chunks={chunks} must be a number of at least 1, or 'auto'")
    if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
        faults.append(f"dtype '{dtype}' is unknown: float32, bfloat16 or float16")
    if faults:
        raise ConfigError("; ".join(faults))
    return codecs


def _opened(
    model: str, revision: str | None, task: str, overrides: Mapping[str, Any]
) -> tuple[Checkpoint, Skeleton]:
    checkpoint = open_checkpoint(model, revision=revision)
    for name, value in overrides.items():
        setattr(checkpoint.config, name, value)
    return checkpoint, skeleton_of(checkpoint.config, task)


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
