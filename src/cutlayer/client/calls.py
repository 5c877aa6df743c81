"""Control calls: one question, one answer, told in our own errors."""

from __future__ import annotations

import time
from typing import Any

import grpc

from cutlayer.client.address import Address
from cutlayer.client.diagnosis import explained

__all__ = ["SERVICE", "ask"]

SERVICE = "cutlayer.v1.Trunk"
_PAUSE_S = 0.1


def ask(
    channel: grpc.Channel,
    address: Address,
    method: str,
    request: Any,
    reply: Any,
    *,
    timeout_s: float,
    again_for_s: float = 0.0,
) -> Any:
    """Return the answer to a control call.

    Args:
        channel: The channel to the server.
        address: Where that is, for the words of an error.
        method: The method's name.
        request: What is asked.
        reply: The class of the answer.
        timeout_s: Seconds for one attempt.
        again_for_s: Seconds for which a call whose link breaks is tried again. For calls that may
            be made twice only: opening a run twice is opening it once, and so is closing it.

    Raises:
        CutlayerError: The server's own, or why it cannot be reached.
    """
    call = channel.unary_unary(
        f"/{SERVICE}/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=reply.FromString,
    )
    deadline_s = time.monotonic() + again_for_s
    while True:
        try:
            return call(request, timeout=timeout_s)
        except grpc.RpcError as error:
            is_broken = error.code() is grpc.StatusCode.UNAVAILABLE
            if not is_broken or time.monotonic() >= deadline_s:
                raise explained(error, address, timeout_s) from None
            time.sleep(_PAUSE_S)
