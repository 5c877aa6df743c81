"""Put a server together: a model's trunk, its sessions, gRPC, health and reflection."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import grpc
import torch
import transformers
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cutlayer.errors import ConfigError
from cutlayer.server.access import Gate, Limits
from cutlayer.server.database import Journal
from cutlayer.server.layers import refuse_without_compiler
from cutlayer.server.orders import Orders
from cutlayer.server.quotas import Desk, Quotas
from cutlayer.server.service import SERVICE, TrunkService
from cutlayer.server.sessions import Sessions
from cutlayer.server.store import Store
from cutlayer.server.tenants import Register
from cutlayer.server.trunk import SharedTrunk
from cutlayer.server.watch import Watch
from cutlayer.server.worker import give_memory_back
from cutlayer.split.cut import Cut
from cutlayer.split.loading import (
    config_digest,
    layer_digests,
    load_trunk,
    open_checkpoint,
    skeleton_of,
)
from cutlayer.split.quantized import quantize_trunk
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.agreement import PROTOCOL
from cutlayer.wire.frames import FRAME_BYTES, MAX_HEAD_BYTES
from cutlayer.wire.tensors import DTYPES

__all__ = ["Server", "make_server"]

log = logging.getLogger(__name__)

_CONTROL_CALLS = 256
"""Calls that are answered at once, while each session has its stream, which takes a thread."""


@dataclass
class Server:
    """A running server."""

    grpc_server: grpc.Server
    sessions: Sessions
    gate: Gate
    orders: Orders
    health: health.HealthServicer
    port: int

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no new work, finish the requests in flight, keep what is to be kept."""
        self.health.enter_graceful_shutdown()
        self.orders.close()
        # Streams end by themselves once their session is marked; their clients come again.
        self.sessions.stop()
        self.grpc_server.stop(grace_s).wait()
        self.gate.stop()


def make_server(
    model: str,
    *,
    bottom_layers: int,
    top_layers: int,
    credentials: grpc.ServerCredentials | None,
    state_dir: Path,
    host: str = "0.0.0.0",  # noqa: S104  # a server is there to be reached
    port: int = 7443,
    task: str = "causal-lm",
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    quantization: str = "",
    device: str = "cpu",
    keep_adapter: bool = False,
    auth: str = "none",
    watch: Watch | None = None,
    quotas: Quotas | None = None,
    limits: Limits | None = None,
    attest: Callable[[bytes], bytes] | None = None,
    row_ttl_s: float = 0.0,
    fuse_tokens: int = 0,
    torch_compile: bool = False,
) -> Server:
    """Load a trunk and serve it.

    Args:
        model: A folder or a hub id.
        bottom_layers: Layers that every client keeps at least below the trunk.
        top_layers: Layers that every client keeps at least above it.
        credentials: TLS credentials; `None` serves plaintext.
        state_dir: Where tenants' states are kept.
        host: Address to listen at.
        port: Port to listen at, 0 for any free one.
        task: `causal-lm` or `sequence-classification`.
        revision: The model's revision on the hub.
        dtype: The trunk's dtype.
        attn_implementation: `eager`, `sdpa`, …; transformers' own choice by default.
        quantization: Store the trunk's linear weights in 8 bits, `int8` or `float8`, or in 4,
            `nf4`.
        device: Where the trunk computes.
        keep_adapter: Keep the trunk's half of adapters; clients are told before they train.
        auth: How tenants are known: one of `access.AUTH`; certificates need `credentials` with an
            authority for clients.
        watch: Tells the audit log and the metrics what happens.
        quotas: What a tenant may use, where the register of tenants says nothing else.
        limits: What a tenant may ask.
        attest: Returns evidence of this server for a client's nonce; without it none is offered.
        row_ttl_s: Seconds for which rows that clients send once are kept; 0 keeps none.
        fuse_tokens: Forwards of so many tokens at most are computed together with those of other
            tenants that wait; 0 computes each alone.
        torch_compile: Compile the layers of forwards that keep a graph.

    Raises:
        ConfigError: If the port is taken, the dtype unknown, or there is no compiler.
        ModelError: If the model cannot be found, cut or loaded.
    """
    if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
        raise ConfigError(f"--dtype '{dtype}' is unknown: float32, bfloat16 or float16")
    if torch_compile:
        refuse_without_compiler(torch.device(device))
    checkpoint = open_checkpoint(model, revision=revision)
    skeleton = skeleton_of(checkpoint.config, task)
    cut = Cut.leaving(
        bottom_layers=bottom_layers,
        top_layers=top_layers,
        num_layers=skeleton.anatomy.num_layers,
    )
    settings = {"attn_implementation": attn_implementation} if attn_implementation else {}
    loaded = load_trunk(checkpoint, skeleton, cut, dtype=DTYPES[dtype], **settings)
    loaded.to(torch.device(device))  # type: ignore[arg-type]
    quantize_trunk(loaded, skeleton.anatomy, cut, quantization)
    if quantization:
        give_memory_back()  # of the weights as they were loaded
    trunk = SharedTrunk(loaded, skeleton.anatomy, cut, compiles=torch_compile)
    agreement = pb.Agreement(
        protocol=PROTOCOL,
        transformers_major=transformers.__version__.partition(".")[0],
        task=task,
        model_type=checkpoint.config.model_type,
        revision=checkpoint.revision,
        config_digest=config_digest(checkpoint.config),
        layer_digests=layer_digests(checkpoint, skeleton.anatomy, cut, trunk=True),
        num_layers=skeleton.anatomy.num_layers,
        lower=cut.lower,
        upper=cut.upper,
        dtype=dtype,
        attn_implementation=loaded.config._attn_implementation or "",
        quantization=quantization,
    )
    journal = Journal(state_dir)
    register = Register(journal)
    sessions = Sessions(
        trunk,
        agreement,
        Store(state_dir),
        limits=limits,
        keeps_adapter=keep_adapter,
        watch=watch,
        desk=Desk(quotas, register.quotas_of),
        row_ttl_s=row_ttl_s,
        fuse_tokens=fuse_tokens,
    )
    offer = sessions.offer()
    offer.model_id, offer.version = Path(model).name, version("cutlayer")
    gate = Gate(register, auth)
    orders = Orders(journal, sessions.close)
    service = TrunkService(sessions, offer, gate, attest)
    return _listen(sessions, service, gate, orders, f"{host}:{port}", credentials)


def _listen(
    sessions: Sessions,
    service: TrunkService,
    gate: Gate,
    orders: Orders,
    address: str,
    credentials: grpc.ServerCredentials | None,
) -> Server:
    calls = sessions.limits.max_sessions + _CONTROL_CALLS
    server = grpc.server(
        ThreadPoolExecutor(calls, thread_name_prefix="grpc"),
        options=[
            ("grpc.max_receive_message_length", FRAME_BYTES + MAX_HEAD_BYTES + 16),
            ("grpc.max_send_message_length", FRAME_BYTES + MAX_HEAD_BYTES + 16),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ],
        maximum_concurrent_rpcs=calls,
    )
    servicer = health.HealthServicer()
    server.add_generic_rpc_handlers((service,))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection(
        (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    try:
        port = (
            server.add_secure_port(address, credentials)
            if credentials is not None
            else server.add_insecure_port(address)
        )
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"cannot listen at {address}: the port is taken or not allowed")
    server.start()
    for name in ("", SERVICE):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return Server(server, sessions, gate, orders, servicer, port)
