"""Say in one sentence why a server cannot be reached. gRPC's own words seldom do."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import grpc

from cutlayer.errors import BY_CODE, ConnectionFailed, CutlayerError, Refused, TLSError

if TYPE_CHECKING:
    from cutlayer.client.address import Address

__all__ = ["explained", "why_unreachable"]

_CERTIFICATE_FAULTS = {
    9: "its certificate is not valid yet: check the clocks of both machines",
    10: "its certificate has expired: make a new one on the server with 'cutlayer certs renew'",
    62: "its certificate is for another host: connect by a name that it holds, or make one with "
    "'cutlayer certs init --host NAME'",
    64: "its certificate is for another address: connect by a name that it holds, or make one "
    "with 'cutlayer certs init --host ADDRESS'",
}


def explained(error: grpc.RpcError, address: Address, timeout_s: float) -> CutlayerError:
    """Return our error for gRPC's."""
    code, details = error.code(), error.details() or ""
    told = {item[0]: item[1] for item in (error.trailing_metadata() or ())}
    if "cutlayer-code" in told:
        return BY_CODE.get(str(told["cutlayer-code"]), Refused)(details)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return why_unreachable(address, details, timeout_s)
    if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN):
        return ConnectionFailed(
            f"what answers at {address.server} is no cutlayer server: check the port"
        )
    return ConnectionFailed(f"the server at {address.server} failed: {details}")


def why_unreachable(address: Address, details: str, timeout_s: float) -> ConnectionFailed:
    """Knock at the server once more, step by step, and return what is wrong."""
    host, port = address.host_and_port()
    at = f"the server at {address.server}"
    try:
        with socket.create_connection((host, port), timeout=min(timeout_s, 5.0)) as raw:
            if address.plaintext:
                return ConnectionFailed(
                    f"{at} answers but not in plaintext: leave out split_plaintext, or start the "
                    "server with --plaintext"
                )
            return _knock_with_tls(address, host, raw, at, details)
    except socket.gaierror:
        return ConnectionFailed(f"host '{host}' has no address: check split_server and the DNS")
    except ConnectionRefusedError:
        return ConnectionFailed(f"nothing listens at {address.server}: is the server running?")
    except TimeoutError:
        return ConnectionFailed(
            f"{at} does not answer within {min(timeout_s, 5.0):.0f} s: check the address and the "
            "firewall"
        )
    except OSError as error:
        return ConnectionFailed(f"{at} cannot be reached ({error.strerror or error})")


def _knock_with_tls(
    address: Address, host: str, raw: socket.socket, at: str, details: str
) -> ConnectionFailed:
    context = ssl.create_default_context(cafile=str(address.ca) if address.ca else None)
    context.set_alpn_protocols(["h2"])
    if address.cert and address.key:
        context.load_cert_chain(address.cert, address.key)
    try:
        with context.wrap_socket(raw, server_hostname=host) as secured:
            if secured.selected_alpn_protocol() != "h2":
                return ConnectionFailed(f"{at} speaks TLS but not gRPC: check the port")
            # A server that wants a client certificate says so only when it is first read from.
            secured.settimeout(2.0)
            if not secured.read(1) and address.cert is None:
                return _wants_a_certificate(at)
    except ssl.SSLCertVerificationError as error:
        fault = _CERTIFICATE_FAULTS.get(
            error.verify_code,
            "its certificate is not signed by the authority in split_ca: copy the server's ca.pem",
        )
        return TLSError(f"{at} is not trusted: {fault}")
    except ssl.SSLError as error:
        if "CERTIFICATE_REQUIRED" in str(error) or "HANDSHAKE_FAILURE" in str(error):
            return _wants_a_certificate(at)
        if "UNKNOWN_CA" in str(error) or "BAD_CERTIFICATE" in str(error) or "EXPIRED" in str(error):
            return TLSError(
                f"{at} does not accept this client's certificate ({error.reason}): get one that "
                "the server's authority signed"
            )
        return ConnectionFailed(
            f"what listens at {address.server} does not speak TLS: check the port, or use "
            "split_plaintext if the server was started so"
        )
    except (TimeoutError, OSError):
        pass
    return ConnectionFailed(f"{at} can be reached but gRPC cannot use it: {details}")


def _wants_a_certificate(at: str) -> TLSError:
    return TLSError(f"{at} asks for a client certificate: give split_cert and split_key")
