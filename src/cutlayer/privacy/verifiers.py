"""Who checks evidence: in software for tests, and TDX with NVIDIA's confidential GPUs.

`SoftwareAttester` signs whatever it is told: no hardware stands behind it.

`TdxNvidiaVerifier` was written from the makers' documents and never met a confidential GPU. Its
half for the CPU (Intel's quote and its collateral, checked offline by dcap-qvl) was tried on one
published quote of real hardware; its half for the GPU (tokens of NVIDIA's attestation service,
which the *server* fetches, checked against NVIDIA's published keys) on tokens of our own making.
NVIDIA's Python SDK is not used: its support ended in September 2026. SEV-SNP has no verifier here.

References:
    Intel TDX DCAP quoting library API, 2023. NVIDIA Attestation: GPU claims 3.0. JWT: RFC 7519.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cutlayer.errors import AttestationFailed, ConfigError
from cutlayer.privacy.attestation import Attester, Claims, Verifier, read_json, version_of

__all__ = [
    "VERIFIERS",
    "SoftwareAttester",
    "SoftwareVerifier",
    "TdxNvidiaVerifier",
    "gpu_nonce",
    "software_attester",
    "verifier_for",
]

NRAS = "https://nras.attestation.nvidia.com"
_GPU_MUST_BE = {
    "measres": "success",
    "secboot": True,
    "x-nvidia-gpu-attestation-report-nonce-match": True,
    "x-nvidia-gpu-attestation-report-signature-verified": True,
}
_CLOCKS_APART_S = 120


@dataclass(frozen=True)
class SoftwareAttester:
    """Sign claims about this machine with a key that its operator has: for tests."""

    key: Any = field(repr=False)
    """An Ed25519 private key."""
    measurements: Mapping[str, str]
    tcb: Mapping[str, str]
    debug: bool = False
    confidential: bool = True

    def evidence(self, report_data: bytes) -> bytes:
        """Return signed evidence that carries `report_data`."""
        body = json.dumps(
            {
                "measurements": dict(self.measurements),
                "tcb": dict(self.tcb),
                "debug": self.debug,
                "confidential_computing": self.confidential,
                "report_data": report_data.hex(),
            }
        )
        signature = self.key.sign(_signed(body))
        told = {"kind": SoftwareVerifier.kind, "body": body, "signature": signature.hex()}
        return json.dumps(told).encode()


@dataclass(frozen=True)
class Replayed:
    """Give the same evidence to every nonce, as a machine would that was in order once."""

    recorded: bytes = field(repr=False)

    def evidence(self, _report_data: bytes) -> bytes:
        """Return what was recorded."""
        return self.recorded


def software_attester(path: Path) -> Attester:
    """Return the attester that a JSON file describes, for `cutlayer serve`.

    Args:
        path: Holds `key` (a file with an Ed25519 private key, in PEM), `measurements`, `tcb`,
            `debug` and `confidential_computing`; or only `replay`, a file with evidence to be
            given to every nonce. Files are named from where it lies.

    Raises:
        ConfigError: If it cannot be read, or names something else.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    where = f"the software attester '{path}'"
    try:
        told = read_json(path.read_bytes())
        if set(told) == {"replay"}:
            return Replayed((path.parent / str(told["replay"])).read_bytes())
        if set(told) != {"key", "measurements", "tcb", "debug", "confidential_computing"}:
            raise ConfigError(
                f"{where} has {', '.join(sorted(told)) or 'nothing'}: make it with 'cutlayer certs "
                "attester'"
            )
        key = load_pem_private_key((path.parent / str(told["key"])).read_bytes(), None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{where} names a key that is not of Ed25519")
        measurements, tcb = dict(told["measurements"]), dict(told["tcb"])
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} cannot be read: {error}") from error
    return SoftwareAttester(
        key, measurements, tcb, bool(told["debug"]), bool(told["confidential_computing"])
    )


def _signed(body: str) -> bytes:
    return b"cutlayer software evidence 1\0" + body.encode()


@dataclass(frozen=True)
class SoftwareVerifier:
    """Check evidence of `SoftwareAttester` against the public keys that a policy trusts."""

    keys: tuple[bytes, ...]
    """Ed25519 public keys, 32 bytes each."""
    kind = "software"

    @classmethod
    def of(cls, trust: Mapping[str, Any]) -> SoftwareVerifier:
        """Return the verifier for a policy's `trust`: `keys`, in hexadecimal.

        Raises:
            ConfigError: If there is none, or one is no key.
        """
        keys = trust.get("keys")
        good = isinstance(keys, list) and all(
            isinstance(key, str) and re.fullmatch(r"[0-9a-fA-F]{64}", key) for key in keys
        )
        if not keys or not good:
            raise ConfigError("trust.keys must list Ed25519 public keys of 64 hexadecimal digits")
        return cls(tuple(bytes.fromhex(key) for key in keys))

    def verify(self, evidence: bytes) -> Claims:
        """Return what signed evidence says.

        Raises:
            AttestationFailed: If it is malformed, or no trusted key signed it.
        """
        try:
            told = read_json(evidence)
            body, signature = str(told["body"]), bytes.fromhex(told["signature"])
            if not any(_is_signed(key, signature, _signed(body)) for key in self.keys):
                raise AttestationFailed(
                    "the server's evidence is signed by no key that the policy trusts: nothing was "
                    "sent"
                )
            found = read_json(body.encode())
            return Claims(
                kind=self.kind,
                hardware=False,
                measurements={str(n): str(d) for n, d in found["measurements"].items()},
                tcb={str(n): str(v) for n, v in found["tcb"].items()},
                debug=found["debug"],
                confidential=found["confidential_computing"],
                report_data=bytes.fromhex(found["report_data"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AttestationFailed(
                f"the server's evidence cannot be read ({type(error).__name__}): nothing was sent; "
                "check that both sides run the same version"
            ) from error


def _is_signed(key: bytes, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


# ---------------------------------------------------------------------------- in hardware


def gpu_nonce(report_data: bytes) -> bytes:
    """Return the 32 bytes with which the GPU's report is asked for, from the CPU's 64.

    So the GPU's evidence is bound to the same connection as the CPU's.
    """
    return hashlib.sha256(b"cutlayer gpu 1\0" + report_data).digest()


@dataclass(frozen=True)
class TdxNvidiaVerifier:
    """Check a TDX quote and the tokens of NVIDIA's attestation service for the GPUs beside it.

    The evidence is a JSON object: `quote` (base64), `collateral` (as dcap-qvl writes it) and `gpu`
    (the service's answer: `[["JWT", overall], {"GPU-0": token, ...}]`). That the GPUs are those of
    this very machine follows from its measured software alone, which must use no others.
    """

    nras_keys: Any
    """NVIDIA's published keys, a JSON Web Key Set."""
    issuer: str = NRAS
    now: Callable[[], float] = time.time
    kind = "tdx+nvidia"

    @classmethod
    def of(cls, trust: Mapping[str, Any]) -> TdxNvidiaVerifier:
        """Return the verifier for a policy's `trust`: `nras_jwks`, a key set.

        Raises:
            ConfigError: If it is missing, or the libraries are.
        """
        jwt, _qvl = _libraries()
        try:
            return cls(jwt.PyJWKSet.from_dict(trust["nras_jwks"]))
        except (KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
            raise ConfigError(
                f"trust.nras_jwks must be the key set that {NRAS}/.well-known/jwks.json publishes"
            ) from error

    def verify(self, evidence: bytes) -> Claims:
        """Return what quote and tokens say.

        Raises:
            AttestationFailed: If a signature, a nonce or a form does not hold.
        """
        try:
            told = read_json(evidence)
            quote = base64.b64decode(told["quote"], validate=True)
            td = self._trust_domain(quote, json.dumps(told["collateral"]))
            gpus = self._gpus(told["gpu"], gpu_nonce(td.report_data).hex())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise AttestationFailed(
                f"the server's evidence cannot be read ({type(error).__name__}): nothing was sent; "
                "check that both sides run the same version"
            ) from error
        registers = ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3", "mr_seam", "mr_config_id")
        svn = td.tee_tcb_svn
        tcb = {"tdx_module": f"{svn[1]:x}.{svn[0]:x}", "tdx_microcode": f"{svn[2]:x}"}
        for name, claim in (
            ("gpu_driver", "x-nvidia-gpu-driver-version"),
            ("gpu_vbios", "x-nvidia-gpu-vbios-version"),
        ):
            # The oldest counts; one that is not told counts as older than any.
            tcb[name] = min((str(gpu.get(claim, "")) for gpu in gpus), key=version_of)
        return Claims(
            kind=self.kind,
            hardware=True,
            measurements={name: getattr(td, name).hex() for name in registers},
            tcb=tcb,
            debug=bool(td.td_attributes[0] & 1)
            or any(gpu.get("dbgstat") != "disabled" for gpu in gpus),
            confidential=all(
                gpu.get(name) == value and type(gpu.get(name)) is type(value)
                for gpu in gpus
                for name, value in _GPU_MUST_BE.items()
            ),
            report_data=bytes(td.report_data),
        )

    def _trust_domain(self, quote: bytes, collateral: str) -> Any:
        _jwt, qvl = _libraries()
        try:
            papers = qvl.QuoteCollateralV3.from_json(collateral)
            status = qvl.verify(quote, papers, int(self.now())).status
            parsed = qvl.parse_quote(quote)
        except ValueError as error:
            raise AttestationFailed(
                f"the server's TDX quote does not verify ({str(error)[:200]}): nothing was sent"
            ) from error
        if not parsed.is_tdx() or status != "UpToDate":
            raise AttestationFailed(
                f"the server's quote is of type {parsed.quote_type()} and its platform is "
                f"'{status}' where TDX and 'UpToDate' are needed: nothing was sent"
            )
        return parsed.report

    def _gpus(self, answer: Any, nonce: str) -> list[dict[str, Any]]:
        (form, overall_token), tokens = answer
        overall = self._token(overall_token, nonce)
        if form != "JWT" or overall.get("x-nvidia-overall-att-result") is not True or not tokens:
            raise AttestationFailed(
                "NVIDIA's attestation service did not find the server's GPUs in order: nothing was "
                "sent"
            )
        if set(overall["submods"]) != set(tokens):
            raise AttestationFailed("the server left out tokens of its GPUs: nothing was sent")
        for name, token in tokens.items():
            digest = str(overall["submods"][name][1][1])
            if not hmac.compare_digest(digest, hashlib.sha256(token.encode()).hexdigest()):
                raise AttestationFailed(
                    f"the token of {name} is not the one that NVIDIA vouched for: nothing was sent"
                )
        return [self._token(token, nonce) for token in tokens.values()]

    def _token(self, token: str, nonce: str) -> dict[str, Any]:
        jwt, _qvl = _libraries()
        try:
            key = self.nras_keys[jwt.get_unverified_header(token)["kid"]]
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=["ES384"],
                issuer=self.issuer,
                leeway=_CLOCKS_APART_S,
                options={"require": ["exp", "iss", "eat_nonce"]},
            )
        except (jwt.PyJWTError, KeyError) as error:
            raise AttestationFailed(
                f"a token for the server's GPU does not verify ({type(error).__name__}): nothing "
                "was sent"
            ) from error
        if not hmac.compare_digest(str(claims["eat_nonce"]).lower().encode(), nonce.encode()):
            raise AttestationFailed(
                "a token for the server's GPU was made for another nonce: nothing was sent"
            )
        return claims


def _libraries() -> tuple[Any, Any]:
    try:
        import dcap_qvl  # type: ignore[import-untyped]
        import jwt
    except ImportError as error:
        raise ConfigError(
            "evidence of TDX and NVIDIA GPUs needs more libraries: pip install 'cutlayer[attest]'"
        ) from error
    return jwt, dcap_qvl


VERIFIERS: dict[str, Callable[[Mapping[str, Any]], Verifier]] = {
    SoftwareVerifier.kind: SoftwareVerifier.of,
    TdxNvidiaVerifier.kind: TdxNvidiaVerifier.of,
}


def verifier_for(kind: str, trust: Mapping[str, Any]) -> Verifier:
    """Return the verifier that a policy names.

    Raises:
        ConfigError: If there is none of this name, or `trust` is not what it needs.
    """
    if kind not in VERIFIERS:
        raise ConfigError(f"verifier '{kind}' is unknown: one of {', '.join(VERIFIERS)}")
    return VERIFIERS[kind](trust)
