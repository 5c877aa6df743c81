"""`cutlayer doctor`: can this run work? Reaches the server and compares, trains nothing."""

from __future__ import annotations

import argparse
import time
from typing import Any

from cutlayer.cli.config import Run, connect_settings, read_run
from cutlayer.cli.main import add_format, report, settle
from cutlayer.errors import Refused

_PROBE_BYTES = 4 << 20


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("--config", required=True, help="the run's YAML; --key value overrides")
    parser.add_argument(
        "--prove",
        action="store_true",
        help="run one random batch split and unsplit; loads the whole model here",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Connect as the run would, measure the link, and close.

    Raises:
        ConnectionFailed, TLSError, Refused: With what stands in the way.
    """
    from cutlayer.client.connect import connect
    from cutlayer.wire.codecs import codec_words, codecs_of

    settle(args.threads)
    settings = read_run(args.config, args.overrides)
    given = connect_settings(settings)
    # A name of its own, so that a doctor never takes the place of the run at the server. What it
    # sends is made up: noise would hide nothing, and the two sides would not compare equal.
    model = connect(**{**given, "run": None, "send_once": False, "defenses": []})
    try:
        facts = _facts(model, given)
        if args.prove:
            facts["proof"] = _proof(settings, model, given)
    finally:
        model.close()
    report(args.format, facts, _text(facts))
    if (
        args.prove
        and not facts["proof"]["equal"]
        and codec_words(codecs_of(given["codec"])) == "raw"
    ):
        raise Refused(
            f"the split model is not equal to the unsplit one (logits differ by "
            f"{facts['proof']['logits']:.2e}): do not train; report the model type"
        )
    return 0


def _facts(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    connection, offer = model.connection, model.connection.offer
    rtt_s = min(_echo_s(connection, 4) for _ in range(5))
    full_s = min(_echo_s(connection, _PROBE_BYTES) for _ in range(3))
    return {
        "server": given["server"],
        "tls": not given["plaintext"],
        "mutual_tls": bool(given["cert"]),
        "token": bool(given["token"] or given["token_file"]),
        "attestation": str(connection.claims or "none asked for"),
        "server_version": offer.version,
        "model_at_server": offer.model_id,
        "layers_compared": len(offer.agreement.layer_digests),
        "server_cut": f"{offer.agreement.lower}:{offer.agreement.upper}",
        "cut": str(model.cut),
        "dtype": given["dtype"],
        "keeps_adapter": model.keeps_adapter,
        "round_trip_ms": rtt_s * 1e3,
        "bandwidth_mbit": 2 * _PROBE_BYTES * 8 / max(full_s - rtt_s, 1e-9) / 1e6,
    }


def _echo_s(connection: Any, size_bytes: int) -> float:
    import torch

    from cutlayer.wire import cutlayer_pb2 as pb

    payload = torch.zeros(size_bytes, dtype=torch.uint8)
    started_s = time.perf_counter()
    connection.request(pb.Head(echo=pb.Echo()), {"payload": payload}).wait()
    return time.perf_counter() - started_s


def _proof(settings: Run, model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Compare logits and every gradient of the adapter on one random batch."""
    import torch
    from peft import get_peft_model

    from cutlayer.split.adapters import seed_adapter
    from cutlayer.split.loading import model_class, open_checkpoint
    from cutlayer.split.quantized import quantize_trunk
    from cutlayer.wire.tensors import DTYPES

    checkpoint = open_checkpoint(given["model"], revision=given["revision"])
    attention = {k: given[k] for k in ("attn_implementation",) if given[k]}
    whole = model_class(checkpoint.config, given["task"]).from_pretrained(
        given["model"], revision=given["revision"], dtype=DTYPES[given["dtype"]], **attention
    )
    quantize_trunk(whole, model.anatomy, model.cut, given["quantization"])
    config = model.plan.config
    unsplit = get_peft_model(whole, config) if given["peft_config"] is not None else whole
    seed_adapter(unsplit, given["seed"])
    generator = torch.Generator().manual_seed(0)
    vocabulary = checkpoint.config.get_text_config().vocab_size
    tokens_BT = torch.randint(vocabulary, (2, 16), generator=generator)
    found: list[tuple[Any, dict[str, Any]]] = []
    for each in (model, unsplit):
        each.eval()
        logits = each(input_ids=tokens_BT).logits
        if each is model and not model.plan.order:
            found.append((logits.detach(), {}))
            continue
        if logits.requires_grad:
            logits.square().mean().backward()
        grads = {n: p.grad for n, p in each.named_parameters() if p.requires_grad}
        found.append((logits.detach(), grads))
    (split_logits, split_grads), (logits, grads) = found
    ours = {name: grads[name] for name in split_grads}
    norms_equal = True
    if model.connection.norms is not None:
        trunks = [grads[name] for name in model.connection.parameters]
        norms_equal = torch.equal(torch.stack(torch._foreach_norm(trunks)), model.connection.norms)
    return {
        "equal": bool(torch.equal(split_logits, logits))
        and norms_equal
        and all(_same(split_grads[name], ours[name]) for name in ours),
        "logits": float((split_logits - logits).abs().max()),
        "gradients_compared": len(grads),
    }


def _same(a: Any, b: Any) -> bool:
    import torch

    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _text(facts: dict[str, Any]) -> str:
    tls = "mutual TLS" if facts["mutual_tls"] else "TLS" if facts["tls"] else "PLAINTEXT"
    tls += ", a token" if facts["token"] else ""
    lines = [
        f"server     {facts['server']} over {tls}, cutlayer {facts['server_version']}",
        f"model      {facts['model_at_server']}, {facts['layers_compared']} layers' weights held "
        "there agree where both sides hold them",
        f"evidence   {facts['attestation']}",
        f"cut        {facts['cut']} within the server's {facts['server_cut']}, {facts['dtype']}",
        f"link       round trip {facts['round_trip_ms']:.1f} ms, "
        f"{facts['bandwidth_mbit']:.0f} Mbit/s up and down",
    ]
    if facts["keeps_adapter"]:
        lines.append("adapter    the server keeps the trunk's half: merge will not have it")
    if "proof" in facts:
        proof = facts["proof"]
        verdict = "equal bit for bit" if proof["equal"] else f"DIFFER by {proof['logits']:.2e}"
        lines.append(
            f"proof      one random batch split and unsplit: {verdict} "
            f"(logits and {proof['gradients_compared']} gradients)"
        )
    return "\n".join(lines)
