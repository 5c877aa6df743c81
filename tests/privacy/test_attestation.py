"""The attestation gate: a server that does not prove what it runs is sent nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cutlayer.cli.certs import issue
from cutlayer.errors import BY_CODE, AttestationFailed, ConfigError
from cutlayer.privacy.attestation import (
    Policy,
    channel_binding,
    gate,
    new_nonce,
    report_data,
)
from cutlayer.privacy.verifiers import (
    NRAS,
    SoftwareAttester,
    SoftwareVerifier,
    TdxNvidiaVerifier,
    gpu_nonce,
    verifier_for,
)

KEY = Ed25519PrivateKey.generate()
DIGEST = "3f" * 48
GOOD = SoftwareAttester(KEY, {"image": DIGEST}, {"firmware": "1.55", "driver": "570.172.08"})
TOLD: dict[str, Any] = {
    "format": 1,
    "verifier": "software",
    "measurements": {"image": ["aa" * 48, DIGEST.upper()]},
    "minimum_tcb": {"firmware": "1.55", "driver": "570.86.15"},
    "debug": False,
    "confidential_computing": True,
    "trust": {"keys": [KEY.public_key().public_bytes_raw().hex()]},
}


@dataclass
class Enclave:
    """A gRPC server over TLS that answers a nonce with evidence, and keeps what it is sent."""

    certs: Path
    name: str
    attester: SoftwareAttester
    sent: list[bytes] = field(default_factory=list)
    nonce: bytes | None = None

    def __enter__(self) -> Enclave:
        cert, key = (self.certs / f"{self.name}.{end}" for end in ("pem", "key"))
        self.certificate = cert.read_bytes()
        self.server = grpc.server(futures.ThreadPoolExecutor(1))
        methods = {"Attest": self.attest, "Send": self.send}
        self.server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "enclave",
                    {n: grpc.unary_unary_rpc_method_handler(m) for n, m in methods.items()},
                ),
            )
        )
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), self.certificate)])
        self.port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.server.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.server.stop(0).wait()

    def attest(self, nonce: bytes, _context: Any) -> bytes:
        """Return evidence for a nonce; for another one, if a test said so."""
        binding = channel_binding(self.certificate)
        return self.attester.evidence(report_data(self.nonce or nonce, binding))

    def send(self, body: bytes, _context: Any) -> bytes:
        """Keep what was sent."""
        self.sent.append(body)
        return b""


def certificate_at(port: int, ca: Path) -> bytes:
    """Return the certificate that a server shows, after an ordinary handshake."""
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as secured,
    ):
        der = secured.getpeercert(binary_form=True)
    return ssl.DER_cert_to_PEM_cert(der).encode()


def send_if_attested(port: int, certificate: bytes, told: dict[str, Any] = TOLD) -> None:
    """Do what a client does: pin the certificate, ask with a nonce, pass the gate, send."""
    policy = Policy.of(told)
    verifier = verifier_for(policy.verifier, policy.trust)
    pinned = grpc.ssl_channel_credentials(certificate)
    with grpc.secure_channel(f"127.0.0.1:{port}", pinned) as channel:
        nonce = new_nonce()
        evidence = channel.unary_unary("/enclave/Attest")(nonce, timeout=5)
        gate(verifier, policy, evidence, nonce, channel_binding(certificate))
        channel.unary_unary("/enclave/Send")(b"activations", timeout=5)


@pytest.fixture(scope="module")
def two_certificates(certs: Path) -> Path:
    """The authority's folder with a second server's certificate for the same host."""
    issue(certs, "server-b", hosts=["127.0.0.1"], server=True)
    return certs


@pytest.fixture
def enclave(two_certificates: Path) -> Iterator[Callable[..., Enclave]]:
    """Return a function that starts an enclave."""
    started: list[Enclave] = []

    def start(attester: SoftwareAttester = GOOD, name: str = "server", **settings: Any) -> Enclave:
        started.append(Enclave(two_certificates, name, attester, **settings).__enter__())
        return started[-1]

    yield start
    for each in started:
        each.__exit__()


def test_a_server_that_proves_itself_is_sent_to(enclave: Any, certs: Path):
    """With good evidence the activations leave."""
    server = enclave()

    send_if_attested(server.port, certificate_at(server.port, certs / "ca.pem"))

    assert server.sent == [b"activations"]


@pytest.mark.parametrize(
    ("attester", "settings", "why"),
    [
        (GOOD, {"nonce": new_nonce()}, "made for another nonce"),
        (replace(GOOD, tcb={"firmware": "1.54", "driver": "570.172.08"}), {}, "must be at least"),
        (replace(GOOD, debug=True), {}, "debugging is on"),
        (replace(GOOD, key=Ed25519PrivateKey.generate()), {}, "signed by no key"),
        (replace(GOOD, confidential=False), {}, "confidential computing is off"),
        (replace(GOOD, measurements={"image": "5e" * 48}), {}, "image is 5e5e5e5e5e5e5e5e, which"),
        (replace(GOOD, measurements={}), {}, "measurement image is none"),
        (replace(GOOD, tcb={"firmware": "1.55"}), {}, "driver is not told"),
    ],
    ids=["nonce", "old-tcb", "debug", "key", "cc-off", "other-image", "no-image", "no-driver"],
)
def test_nothing_is_sent_to_one_that_does_not(
    enclave: Any, certs: Path, attester: SoftwareAttester, settings: dict[str, Any], why: str
):
    """T-D7: each negative vector is refused, and no byte of activations reaches the server."""
    server = enclave(attester, **settings)

    with pytest.raises(AttestationFailed, match=why) as refused:
        send_if_attested(server.port, certificate_at(server.port, certs / "ca.pem"))

    assert server.sent == []
    assert "nothing was sent" in str(refused.value)
    assert refused.value.exit_code == 9


def test_evidence_relayed_from_another_machine_is_refused(enclave: Any, certs: Path):
    """T-D7: a machine with another key cannot show a good one's evidence for the same nonce."""
    good, bad = enclave(), enclave(name="server-b")
    shown = certificate_at(bad.port, certs / "ca.pem")
    bad.certificate = good.certificate  # it has the good machine attest to that one's certificate

    with pytest.raises(AttestationFailed, match="another TLS certificate"):
        send_if_attested(bad.port, shown)

    assert bad.sent == []


def test_a_pinned_channel_talks_to_the_holder_of_the_key_alone(enclave: Any, certs: Path):
    """GRPC given a server's certificate as its only root reaches no other of the same authority."""
    good, other = enclave(), enclave(name="server-b")
    shown = certificate_at(good.port, certs / "ca.pem")

    assert channel_binding(shown) == channel_binding(good.certificate)
    with pytest.raises(grpc.RpcError) as refused:
        send_if_attested(other.port, shown)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "handshake failed" in refused.value.details()
    assert other.sent == []


@pytest.mark.parametrize(
    "evidence",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"kind": "software"}',
        b'{"kind": "software", "body": "{}", "signature": "zz"}',
        json.dumps({"body": "{}", "signature": KEY.sign(b"{}").hex()}).encode(),
        b" " * (1 << 20) + b"{}",
    ],
    ids=["empty", "list", "no-text", "nested", "bare", "no-hex", "other-purpose", "large"],
)
def test_malformed_evidence_is_refused_in_a_sentence(evidence: bytes):
    """Whatever a server answers, it ends in AttestationFailed."""
    policy = Policy.of(TOLD)
    verifier = verifier_for(policy.verifier, policy.trust)

    with pytest.raises(AttestationFailed, match="nothing was sent"):
        gate(verifier, policy, evidence, new_nonce(), hashlib.sha256(b"certificate").digest())


def test_evidence_without_a_channel_or_a_nonce_is_refused():
    """No TLS certificate, or an empty nonce, proves nothing about this connection."""
    with pytest.raises(AttestationFailed, match="use TLS"):
        channel_binding(b"")
    with pytest.raises(AttestationFailed, match="cannot prove anything"):
        gate(SoftwareVerifier(()), Policy.of(TOLD), b"{}", b"", b"")


def test_software_evidence_says_that_it_is_software():
    """Claims that a software key signed do not pass for hardware."""
    nonce, binding = new_nonce(), hashlib.sha256(b"certificate").digest()
    policy = Policy.of(TOLD)

    claims = gate(
        verifier_for(policy.verifier, policy.trust),
        policy,
        GOOD.evidence(report_data(nonce, binding)),
        nonce,
        binding,
    )

    assert not claims.hardware
    assert "no hardware stands behind it" in str(claims)
    assert policy.faults_of(replace(claims, kind="tdx+nvidia")) == [
        "evidence of kind 'tdx+nvidia' where 'software' is asked for"
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"debug": True}, "debug must be false"),
        ({"debug": 0}, "debug must be false"),
        ({"confidential_computing": False}, "confidential_computing must be true"),
        ({"format": 2}, "format must be 1"),
        ({"measurements": {}}, "else any software would pass"),
        ({"measurements": {"image": []}}, "else any software would pass"),
        ({"measurements": {"image": ["latest"]}}, "one digest in hexadecimal"),
        ({"minimum_tcb": {}}, "minimum_tcb must give a version"),
        ({"minimum_tcb": {"firmware": "newest"}}, "minimum_tcb must give a version"),
        ({"allow_debug": True}, "allow_debug is unknown"),
        ({"trust": []}, "trust is missing or no dict"),
    ],
)
def test_a_policy_that_protects_nothing_is_refused(
    tmp_path: Path, change: dict[str, Any], why: str
):
    """A policy file that would let debugging or any software pass is named with its fault."""
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(TOLD | change))

    with pytest.raises(ConfigError, match=why):
        Policy.load(path)


def test_a_policy_file_that_cannot_be_read_is_named(tmp_path: Path):
    """A missing file, no JSON, a key given twice and an unknown verifier each get a sentence."""
    path = tmp_path / "policy.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.load(path)
    path.write_text('{"debug": false, "debug": true}')
    with pytest.raises(ConfigError, match="a key is named twice"):
        Policy.load(path)
    with pytest.raises(ConfigError, match="verifier 'sgx' is unknown: one of software, tdx"):
        verifier_for("sgx", {})
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        verifier_for("software", {"keys": ["abc"]})
    with pytest.raises(ConfigError, match="nras_jwks must be the key set"):
        verifier_for("tdx+nvidia", {})


def test_the_error_has_a_stable_code():
    """Scripts may rely on the code and the exit code."""
    assert BY_CODE["attestation"] is AttestationFailed
    assert AttestationFailed.exit_code == 9


# ------------------------------------------------------------------ the GPU's half, on own tokens


class Service:
    """Write tokens as NVIDIA's service does, with a key of our own."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))
        self.jwks = {"keys": [{**jwk, "kid": "nv-1", "alg": "ES384", "use": "sig"}]}

    def token(self, claims: dict[str, Any], **header: Any) -> str:
        """Return a signed token."""
        times = {"iss": NRAS, "exp": int(time.time()) + 86_400}
        return jwt.encode(
            times | claims, self.key, algorithm="ES384", headers={"kid": "nv-1", **header}
        )

    def answer(
        self, nonce: str, gpu: dict[str, Any] | None = None, overall: dict[str, Any] | None = None
    ) -> Any:
        """Return the service's answer for one GPU, with some claims changed."""
        claims = {
            "eat_nonce": nonce,
            "measres": "success",
            "secboot": True,
            "dbgstat": "disabled",
            "x-nvidia-gpu-attestation-report-nonce-match": True,
            "x-nvidia-gpu-attestation-report-signature-verified": True,
            "x-nvidia-gpu-driver-version": "570.172.08",
            "x-nvidia-gpu-vbios-version": "96.00.9F.00.01",
        }
        token = self.token(claims | (gpu or {}))
        digest = hashlib.sha256(token.encode()).hexdigest()
        submods = {"GPU-0": ["DIGEST", ["SHA-256", digest]]}
        told = {"eat_nonce": nonce, "x-nvidia-overall-att-result": True, "submods": submods}
        return [["JWT", self.token(told | (overall or {}))], {"GPU-0": token}]


SERVICE = Service()
NONCE = gpu_nonce(b"\x07" * 64).hex()


def test_gpu_tokens_verify_and_tell_their_claims():
    """Tokens that the service signed for our nonce give the GPU's claims."""
    verifier = TdxNvidiaVerifier.of({"nras_jwks": SERVICE.jwks})

    (gpu,) = verifier._gpus(SERVICE.answer(NONCE), NONCE)

    assert gpu["x-nvidia-gpu-vbios-version"] == "96.00.9F.00.01"


def swapped(answer: Any) -> Any:
    """Put another token of the same GPU in place of the one that the service vouched for."""
    return [answer[0], {"GPU-0": SERVICE.answer(NONCE)[1]["GPU-0"]}]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (SERVICE.answer(gpu_nonce(bytes(64)).hex()), "made for another nonce"),
        (SERVICE.answer(NONCE, {"eat_nonce": "00" * 32}), "made for another nonce"),
        (SERVICE.answer(NONCE, overall={"x-nvidia-overall-att-result": False}), "in order"),
        (SERVICE.answer(NONCE, overall={"exp": int(time.time()) - 600}), "ExpiredSignature"),
        (SERVICE.answer(NONCE, overall={"iss": "https://example.org"}), "InvalidIssuer"),
        (Service().answer(NONCE), "InvalidSignature"),
        (swapped(SERVICE.answer(NONCE)), "not the one that NVIDIA vouched for"),
        ([SERVICE.answer(NONCE)[0], {}], "in order|left out"),
        ([["JWT", SERVICE.token({"eat_nonce": NONCE}, kid="nv-2")], {}], "KeyError"),
    ],
    ids=["nonce", "gpu-nonce", "failed", "old", "issuer", "key", "swapped", "no-gpu", "kid"],
)
def test_gpu_tokens_that_do_not_hold_are_refused(answer: Any, why: str):
    """Each altered answer of the service is refused."""
    verifier = TdxNvidiaVerifier.of({"nras_jwks": SERVICE.jwks})

    with pytest.raises(AttestationFailed, match=why):
        verifier._gpus(answer, NONCE)


def test_a_quote_that_is_none_is_refused():
    """Bytes that no TDX machine signed do not pass, whatever the GPU's tokens say."""
    verifier = TdxNvidiaVerifier.of({"nras_jwks": SERVICE.jwks})
    papers = dict.fromkeys(
        (
            "pck_crl_issuer_chain",
            "tcb_info_issuer_chain",
            "tcb_info",
            "qe_identity_issuer_chain",
            "qe_identity",
        ),
        "",
    ) | dict.fromkeys(("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"), "")
    told = {
        "quote": base64.b64encode(bytes(5000)).decode(),
        "collateral": papers,
        "gpu": SERVICE.answer(NONCE),
    }

    with pytest.raises(AttestationFailed, match="TDX quote does not verify"):
        verifier.verify(json.dumps(told).encode())
    with pytest.raises(AttestationFailed, match="cannot be read"):
        verifier.verify(json.dumps({**told, "quote": "no base64"}).encode())
