"""`cutlayer serve`: hold the trunk of a model and train tenants' adapters on it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.cli.logs import begin_log
from cutlayer.cli.tenants import add_quotas, quotas_of
from cutlayer.errors import ConfigError, ProtocolError

if TYPE_CHECKING:
    from cutlayer.server.app import Server
    from cutlayer.server.metrics import Metrics
    from cutlayer.server.status_page import Status

log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="a folder or a hub id")
    add("--model_revision", help="the model's revision on the hub")
    add("--split_bottom_layers", type=int, required=True, help="first layers that clients keep")
    add("--split_top_layers", type=int, required=True, help="last layers that clients keep")
    add("--host", default="0.0.0.0", help="address to listen at (default: every one)")  # noqa: S104
    add("--port", type=int, default=7443, help="port to listen at (default: 7443; 0: any free)")
    add("--certs", help="folder of 'cutlayer certs init'")
    add("--tls_cert", help="the server's certificate, instead of --certs")
    add("--tls_key", help="the server's private key, instead of --certs")
    add("--tls_client_ca", help="let only clients in whose certificate this authority signed")
    add("--mutual_tls", action="store_true", help="the same with the authority of --certs")
    add(
        "--auth",
        choices=("none", "tls", "token", "both"),
        help="how tenants are known: by client "
        "certificate (tls), by bearer token, or both (default: tls with --mutual_tls, else none)",
    )
    add("--plaintext", action="store_true", help="no TLS: everybody on the way can read the text")
    add("--task", default="causal-lm", choices=("causal-lm", "sequence-classification"))
    add("--dtype", default="float32", help="of the trunk's weights (default: float32)")
    add("--attn_implementation", help="eager, sdpa, … (default: transformers' choice)")
    add(
        "--quantization",
        default="",
        choices=("int8", "float8", "nf4"),
        help="of the trunk: 8 bits, or 4",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: cpu)")
    add("--state_dir", default="cutlayer-state", help="where tenants' states are kept")
    add("--audit_log", help="where events are logged (default: audit.jsonl in --state_dir)")
    add("--keep_adapter", action="store_true", help="never give out the trunk's half of adapters")
    add(
        "--software_evidence_proving_no_hardware",
        metavar="FILE",
        help="answer Attest with evidence that software signs, for tests and trials; FILE is "
        "attester.json of 'cutlayer certs attester'",
    )
    add(
        "--send_once_ttl_s",
        type=float,
        default=0.0,
        metavar="S",
        help="let clients send each row once and keep it, under their keys, for S seconds "
        "(default: 0, keep none; what is kept is deleted)",
    )
    add(
        "--fuse_tokens",
        type=int,
        default=0,
        metavar="N",
        help="compute forwards of N tokens at most together with other tenants' that wait; results "
        "are within rounding of those alone, and not bit-equal (default: 0, each alone)",
    )
    add(
        "--torch_compile",
        action="store_true",
        help="compile the layers that are trained through; faster, within rounding and not "
        "bit-equal; each new kind of LoRA is compiled at its first step, while all wait",
    )
    add("--lease_s", type=float, default=300.0, help="silence that parks a session (default: 300)")
    add("--max_sessions", type=int, default=256, help="sessions open at once (default: 256)")
    add_quotas(parser, "of every tenant (default: no limit)")
    add("--metrics_port", type=int, help="serve /metrics and a status page there (default: no)")
    add("--metrics_host", default="127.0.0.1", help="address of that port (default: 127.0.0.1)")
    add("--log_format", choices=("text", "json"), default="text", help="of the log (default: text)")
    add("--threads", type=int, help="CPU threads of the trunk (default: torch's choice)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; then finish what is in flight."""
    from cutlayer.cli.main import settle
    from cutlayer.server.access import Limits, server_credentials
    from cutlayer.server.app import make_server
    from cutlayer.server.audit_log import AUDIT_LOG, AuditLog
    from cutlayer.server.metrics import Metrics
    from cutlayer.server.metrics_port import MetricsPort
    from cutlayer.server.presence import Presence
    from cutlayer.server.quotas import Quotas
    from cutlayer.server.watch import Watch

    begin_log(args.log_format)
    _refuse_out_of_bounds(args)
    settle(args.threads)
    _allow_many_connections()
    _check_ports(args)
    _check_device(args.device)
    auth = _auth(args)
    credentials = None if args.plaintext else server_credentials(*_tls_files(args, auth))
    attest = _attester(args)
    presence = Presence(Path(args.state_dir))
    audit = AuditLog(Path(args.audit_log or Path(args.state_dir) / AUDIT_LOG))
    metrics = Metrics()
    server = make_server(
        args.model_name_or_path,
        revision=args.model_revision,
        bottom_layers=args.split_bottom_layers,
        top_layers=args.split_top_layers,
        credentials=credentials,
        state_dir=Path(args.state_dir),
        host=args.host,
        port=args.port,
        task=args.task,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        quantization=args.quantization,
        device=args.device,
        keep_adapter=args.keep_adapter,
        auth=auth,
        watch=Watch(audit, metrics),
        quotas=Quotas(**quotas_of(args)),
        limits=Limits(max_sessions=args.max_sessions, lease_s=args.lease_s),
        attest=attest,
        row_ttl_s=max(args.send_once_ttl_s, 0.0),
        fuse_tokens=max(args.fuse_tokens, 0),
        torch_compile=args.torch_compile,
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    trunk = server.sessions.trunk
    status = _status(args, metrics, server, auth)
    status.is_serving = lambda: not stop.is_set()
    if args.metrics_port is not None:
        port = MetricsPort(status, args.metrics_host, args.metrics_port)
        status.about["metrics"] = f"http://{port.host}:{port.port}/"
        print(f"metrics and status page at {status.about['metrics']}", flush=True)
    presence.tell(status.about)
    print(
        f"serving layers {trunk.cut} of {trunk.anatomy.num_layers} of {args.model_name_or_path} at "
        f"{args.host}:{server.port} {'in PLAINTEXT' if args.plaintext else 'over TLS'}",
        flush=True,
    )
    stop.wait()
    server.stop()
    presence.close()
    return 0


def _status(args: argparse.Namespace, metrics: Metrics, server: Server, auth: str) -> Status:
    """Return the facts that the status page shows."""
    from importlib.metadata import version

    from cutlayer.server.overview import runs_of
    from cutlayer.server.status_page import Status

    metrics.runs = partial(runs_of, server.sessions)
    metrics.queue_depth = server.sessions.waiting
    if server.sessions.fuser is not None:
        metrics.fused = server.sessions.fuser.fused.copy
    about = {
        "version": version("cutlayer"),
        "model": Path(args.model_name_or_path).name,
        "layers": str(server.sessions.trunk.cut),
        "address": f"{args.host}:{server.port}",
        "auth": auth,
    }
    status = Status(metrics, about)
    audit = server.sessions.watch.audit
    if audit is not None:
        status.audit_head = lambda: {"lines": audit.head.lines, "head": audit.head.hash}
    return status


def _attester(args: argparse.Namespace) -> Callable[[bytes], bytes] | None:
    """Return what answers a nonce with evidence, `None` if none is offered."""
    from cutlayer.privacy.attestation import NONCE_BYTES, channel_binding, report_data
    from cutlayer.privacy.verifiers import software_attester

    if not args.software_evidence_proving_no_hardware:
        return None
    if args.plaintext:
        raise ConfigError("evidence is bound to the server's certificate: leave out --plaintext")
    path = Path(args.software_evidence_proving_no_hardware)
    binding = channel_binding(_tls_files(args, "none")[0].read_bytes())
    software_attester(path)
    log.warning("evidence is signed by software: it proves nothing about this machine's hardware")

    def answer(nonce: bytes) -> bytes:
        if len(nonce) != NONCE_BYTES:
            raise ProtocolError(f"a nonce has {NONCE_BYTES} bytes, this one {len(nonce)}")
        # Read again each time, so that a trial may change what this machine claims.
        return software_attester(path).evidence(report_data(nonce, binding))

    return answer


def _refuse_out_of_bounds(args: argparse.Namespace) -> None:
    least = {"lease_s": 1.0, "max_sessions": 1, "send_once_ttl_s": 0.0, "fuse_tokens": 0}
    faults = [
        f"--{name} {getattr(args, name)} must be at least {bound}"
        for name, bound in least.items()
        if not getattr(args, name) >= bound  # so that NaN is none
    ]
    if faults:
        raise ConfigError("; ".join(faults))


def _check_ports(args: argparse.Namespace) -> None:
    faults = [
        f"--{name} {number}: a port is from 0 to 65535"
        for name in ("port", "metrics_port")
        if (number := getattr(args, name)) is not None and not 0 <= number <= 65535
    ]
    if faults:
        raise ConfigError("; ".join(faults))


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--device '{name}' cannot be used here ({what[:160]}): cpu, cuda, cuda:1, …"
        ) from error


def _auth(args: argparse.Namespace) -> str:
    """Return how tenants are known, once the flags agree."""
    by_certificate = bool(args.mutual_tls or args.tls_client_ca)
    auth: str = args.auth or ("tls" if by_certificate else "none")
    if by_certificate and auth in ("none", "token"):
        raise ConfigError(
            f"--auth {auth} takes no client certificates: use --auth both for certificate and "
            "token, or leave out --mutual_tls and --tls_client_ca"
        )
    if args.plaintext and auth != "none":
        raise ConfigError(
            f"--auth {auth} needs TLS: without it everybody on the way could use the same token; "
            "leave out --plaintext"
        )
    if auth == "none":
        log.warning("everybody who reaches the port is let in, and all are one tenant: see --auth")
    return auth


def _tls_files(args: argparse.Namespace, auth: str) -> tuple[Path, Path, Path | None]:
    by_certificate = auth in ("tls", "both")
    certs = Path(args.certs) if args.certs else None
    cert = args.tls_cert or (certs and certs / "server.pem")
    key = args.tls_key or (certs and certs / "server.key")
    ca = args.tls_client_ca or (certs / "ca.pem" if by_certificate and certs else None)
    if not cert or not key:
        raise ConfigError(
            "TLS needs a certificate: give --certs (made by 'cutlayer certs init'), or --tls_cert "
            "and --tls_key; --plaintext goes without"
        )
    if by_certificate and not ca:
        raise ConfigError(f"--auth {auth} needs an authority: give --certs or --tls_client_ca")
    return Path(cert), Path(key), Path(ca) if ca else None


def _allow_many_connections() -> None:
    """Use all the file descriptors that we may, so that idle strangers do not keep tenants out."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where 'no limit' is more than can be set
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
