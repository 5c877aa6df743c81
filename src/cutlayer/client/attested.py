"""Open a channel; to a server that must prove what it is, only once it has.

gRPC's Python tells neither side's certificate nor TLS's exporter. So the server's certificate is
fetched by a handshake of our own and checked against the authority, and is from then on the *only*
root of the channel: gRPC talks to the holder of that key or to nobody, after a reconnect too. The
evidence must name this certificate and a fresh nonce.
"""

from __future__ import annotations

import socket
import ssl

import grpc

from cutlayer.client.address import Address
from cutlayer.client.diagnosis import why_unreachable
from cutlayer.errors import AttestationFailed
from cutlayer.privacy.attestation import Claims, channel_binding, gate, new_nonce
from cutlayer.privacy.verifiers import verifier_for
from cutlayer.wire import cutlayer_pb2 as pb

__all__ = ["open_channel"]

_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def open_channel(address: Address, timeout_s: float) -> tuple[grpc.Channel, Claims | None]:
    """Return a channel, and what the server proved if the address has a policy.

    Of ours the server has seen a nonce, and with mutual TLS our certificate; no token.

    Raises:
        ConfigError: If a file of the address or the policy's trust is wrong.
        ConnectionFailed: If the server cannot be reached or trusted.
        AttestationFailed: If it does not prove what the policy asks for.
    """
    if address.policy is None:
        return address.open_channel(), None
    verifier = verifier_for(address.policy.verifier, address.policy.trust)
    certificate = _certificate_of(address, timeout_s)
    nonce = new_nonce()
    with address.open_channel(certificate, anonymous=True) as channel:
        evidence = _evidence(channel, address, nonce, timeout_s)
    claims = gate(verifier, address.policy, evidence, nonce, channel_binding(certificate))
    return address.open_channel(certificate), claims


def _certificate_of(address: Address, timeout_s: float) -> bytes:
    """Return the certificate that the server shows, in PEM, checked against the authority."""
    host, port = address.host_and_port()
    address.credentials()  # names a file that is missing or open to others
    try:
        context = ssl.create_default_context(cafile=str(address.ca) if address.ca else None)
        context.set_alpn_protocols(["h2"])
        if address.cert and address.key:
            context.load_cert_chain(address.cert, address.key)
        with (
            socket.create_connection((host, port), timeout=timeout_s) as raw,
            context.wrap_socket(raw, server_hostname=host) as secured,
        ):
            der = secured.getpeercert(binary_form=True)
    except (OSError, ssl.SSLError) as error:
        raise why_unreachable(address, str(error), timeout_s) from error
    return ssl.DER_cert_to_PEM_cert(der or b"").encode()


def _evidence(channel: grpc.Channel, address: Address, nonce: bytes, timeout_s: float) -> bytes:
    ask = channel.unary_unary(
        "/cutlayer.v1.Trunk/Attest",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=pb.AttestReply.FromString,
    )
    try:
        return ask(pb.AttestRequest(nonce=nonce), timeout=timeout_s).evidence
    except grpc.RpcError as error:
        if error.code() in _UNREACHABLE:
            raise why_unreachable(address, error.details() or "", timeout_s) from None
        # What it says itself is not repeated: it has proved nothing yet.
        raise AttestationFailed(
            f"the server at {address.server} gives no evidence of what it runs "
            f"({error.code().name.lower()}): nothing was sent; leave out split_attestation_policy, "
            "or use a server that offers it"
        ) from None
