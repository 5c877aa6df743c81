"""Attestation gate (defense D7): nothing is sent unless the server proves what it runs.

    nonce = new_nonce()                                   # fresh for every connection
    evidence = ...                                        # what the server answers to the nonce
    gate(verifier, policy, evidence, nonce, channel_binding(certificate))

Evidence says what was started (measurements), how new it is (TCB), whether a debugger may look in
and whether memory and GPU are in confidential mode. Three things make it worth something: a
signature by keys that the server's operator does not have (the verifier's part), a policy that
says what is wanted, and a binding to *this* connection. Without the last an operator could relay
the evidence of a machine elsewhere.

The binding is `report_data`: a digest of the client's nonce and the digest of the server's TLS
certificate, whose key must have been made inside. The TLS exporter (RFC 9266) would be the better
half, but gRPC's Python has no call for it, and on the client's side none for the peer's certificate
either. So the client must fetch the certificate by a handshake of its own and give it to the
channel as the *only* root: gRPC then talks to nobody but the holder of that very key.

Verifiers are in verifiers.py. What a verified trunk protects from is its operator; side channels
of the hardware remain.

References:
    RATS architecture: RFC 9334. tls-server-end-point: RFC 5929.
    Attested TLS: Knauth et al., 2018, https://arxiv.org/abs/1801.05863
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cutlayer.errors import AttestationFailed, ConfigError

__all__ = [
    "Attester",
    "Claims",
    "Policy",
    "Verifier",
    "channel_binding",
    "gate",
    "new_nonce",
    "read_json",
    "report_data",
    "version_of",
]

NONCE_BYTES = 32
MAX_EVIDENCE_BYTES = 1 << 20
FORMAT = 1


@dataclass(frozen=True)
class Claims:
    """What evidence says of a server, once its signatures are found good."""

    kind: str
    """The verifier's name."""
    hardware: bool
    """Whether keys of the hardware's maker stand behind it."""
    measurements: Mapping[str, str]
    """Digests of what was started, in hexadecimal, by the register's name."""
    tcb: Mapping[str, str]
    """Versions of firmware and drivers, by name."""
    debug: bool
    """Whether a debugger may look in."""
    confidential: bool
    """Whether confidential computing is on."""
    report_data: bytes = field(repr=False)
    """What the evidence was made for."""

    def __str__(self) -> str:
        """Return in a sentence what stands behind the evidence."""
        if not self.hardware:
            return f"attested by '{self.kind}': software signed it and no hardware stands behind it"
        return f"attested by '{self.kind}', bound to this connection's certificate"


class Attester(Protocol):
    """The server's side."""

    def evidence(self, report_data: bytes) -> bytes:
        """Return evidence of this machine that carries `report_data`, 64 bytes."""


class Verifier(Protocol):
    """The client's side."""

    kind: str

    def verify(self, evidence: bytes) -> Claims:
        """Return what the evidence says, its signatures checked up to a root that we trust.

        Raises:
            AttestationFailed: If they do not hold, or it cannot be read.
        """


# ---------------------------------------------------------------------------- the binding


def new_nonce() -> bytes:
    """Return 32 fresh bytes; each serves for one connection."""
    return secrets.token_bytes(NONCE_BYTES)


def channel_binding(certificate_pem: bytes) -> bytes:
    """Return the SHA-256 digest of a server's certificate, the first of a chain in PEM.

    Raises:
        AttestationFailed: If there is none, as on a connection without TLS.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        return x509.load_pem_x509_certificate(certificate_pem).fingerprint(SHA256())
    except ValueError as error:
        raise AttestationFailed(
            "the connection has no server certificate that evidence could be bound to: nothing was "
            "sent; use TLS"
        ) from error


def report_data(nonce: bytes, binding: bytes) -> bytes:
    """Return the 64 bytes that evidence for this nonce and this channel carries."""
    parts = (b"cutlayer attestation 1", nonce, binding)
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.sha512(framed).digest()


# ---------------------------------------------------------------------------- the policy


@dataclass(frozen=True)
class Policy:
    """What a client asks of a server; that debugging is off and confidential mode on, always."""

    verifier: str
    """The kind of evidence."""
    measurements: Mapping[str, frozenset[str]]
    """By register the digests that are allowed."""
    minimum_tcb: Mapping[str, str]
    """By name the lowest version that is allowed."""
    trust: Mapping[str, Any]
    """What the verifier trusts: keys, or files with keys."""

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy from a JSON file.

        Raises:
            ConfigError: Naming all that is wrong with it.
        """
        try:
            told = read_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"attestation policy '{path}' cannot be read: {error}") from error
        return cls.of(told, where=f"attestation policy '{path}'")

    @classmethod
    def of(cls, told: Mapping[str, Any], *, where: str = "attestation policy") -> Policy:
        """Return the policy that these settings describe.

        Args:
            told: `format`, `verifier`, `measurements`, `minimum_tcb`, `debug`,
                `confidential_computing` and `trust`.
            where: A name for errors.

        Raises:
            ConfigError: Naming all that is wrong with them.
        """
        expected = {"format": FORMAT, "debug": False, "confidential_computing": True}
        free = {"verifier": str, "measurements": dict, "minimum_tcb": dict, "trust": dict}
        faults = [f"{key} is unknown" for key in sorted(set(told) - set(expected) - set(free))]
        faults += [
            f"{key} must be {json.dumps(value)}; anything else would protect nothing"
            for key, value in expected.items()
            if json.dumps(told.get(key)) != json.dumps(value)
        ]
        faults += [
            f"{key} is missing or no {kind.__name__}"
            for key, kind in free.items()
            if not isinstance(told.get(key), kind)
        ]
        if faults:
            raise ConfigError(f"{where}: {'; '.join(faults)}")
        measurements = {name: _digests(allowed) for name, allowed in told["measurements"].items()}
        if not measurements or not all(measurements.values()):
            raise ConfigError(
                f"{where}: measurements must list at least one digest in hexadecimal for every "
                "register, and name at least one; else any software would pass"
            )
        unreadable = [name for name, least in told["minimum_tcb"].items() if not version_of(least)]
        if not told["minimum_tcb"] or unreadable:
            raise ConfigError(
                f'{where}: minimum_tcb must give a version such as "550.90.07" for every name, and '
                "at least one"
            )
        return cls(told["verifier"], measurements, dict(told["minimum_tcb"]), dict(told["trust"]))

    def faults_of(self, claims: Claims) -> list[str]:
        """Return in what a server falls short of the policy."""
        faults = []
        if claims.kind != self.verifier:
            faults.append(f"evidence of kind '{claims.kind}' where '{self.verifier}' is asked for")
        for name, allowed in self.measurements.items():
            found = claims.measurements.get(name, "none")
            if found.lower() not in allowed:
                faults.append(f"measurement {name} is {found[:16]}, which is not allowed")
        for name, least in self.minimum_tcb.items():
            version = claims.tcb.get(name, "")
            if not version_of(version) or version_of(version) < version_of(least):
                faults.append(f"{name} is {version or 'not told'} and must be at least {least}")
        if claims.debug is not False:
            faults.append("debugging is on, so its operator can look in")
        if claims.confidential is not True:
            faults.append("confidential computing is off")
        return faults


def _digests(allowed: Any) -> frozenset[str]:
    given = allowed if isinstance(allowed, list) else []
    good = all(isinstance(d, str) and re.fullmatch(r"[0-9a-fA-F]{32,128}", d) for d in given)
    return frozenset(digest.lower() for digest in given) if good else frozenset()


def version_of(version: Any) -> tuple[int, ...]:
    """Return a version as numbers that can be compared.

    Some makers count in hexadecimal (`96.00.9F.00.01`); read so, decimal parts keep their order.
    """
    parts = re.split(r"[.-]", version) if isinstance(version, str) else []
    if not all(re.fullmatch(r"[0-9a-fA-F]{1,16}", part) for part in parts):
        return ()
    return tuple(int(part, 16) for part in parts)


# ---------------------------------------------------------------------------- the gate


def gate(
    verifier: Verifier, policy: Policy, evidence: bytes, nonce: bytes, binding: bytes
) -> Claims:
    """Return what is proved of the server, or raise so that nothing is sent.

    Args:
        verifier: Checks the evidence's signatures.
        policy: What is asked for.
        evidence: What the server answered.
        nonce: What this client asked it with, made by `new_nonce` for this connection.
        binding: The `channel_binding` of the certificate at the other end of it.

    Raises:
        AttestationFailed: Naming what does not hold.
    """
    if len(nonce) != NONCE_BYTES or len(binding) != hashlib.sha256().digest_size:
        raise AttestationFailed(
            f"a nonce of {len(nonce)} bytes and a binding of {len(binding)} cannot prove anything: "
            "nothing was sent; use new_nonce and channel_binding"
        )
    if len(evidence) > MAX_EVIDENCE_BYTES:
        raise AttestationFailed(
            f"the server's evidence has {len(evidence)} bytes and at most {MAX_EVIDENCE_BYTES} are "
            "read: nothing was sent"
        )
    claims = verifier.verify(evidence)
    if not hmac.compare_digest(claims.report_data, report_data(nonce, binding)):
        raise AttestationFailed(
            "the server's evidence was made for another nonce or another TLS certificate: it may "
            "be an old answer, or that of another machine; nothing was sent"
        )
    faults = policy.faults_of(claims)
    if faults:
        raise AttestationFailed(
            f"the server does not meet the attestation policy ({'; '.join(faults)}): nothing was "
            "sent"
        )
    return claims


def read_json(text: bytes) -> dict[str, Any]:
    """Return a JSON object that a stranger wrote.

    Raises:
        ValueError: If it is none, names a key twice, or is nested too deep.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a key is named twice")
        return dict(pairs)

    try:
        told = json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(told, dict):
        raise ValueError("it is no JSON object")
    return told
