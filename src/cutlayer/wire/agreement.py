"""What a client and a server must hold in common, and how a difference is told."""

from __future__ import annotations

from cutlayer.wire.cutlayer_pb2 import Agreement

__all__ = ["PROTOCOL", "disagreements"]

PROTOCOL = 3

_REMEDIES = {
    "protocol": "install the same release of cutlayer on both sides",
    "transformers_major": "install the same major version of transformers on both sides",
    "task": "start the server for this task (--task) or connect with its task",
    "model_type": "name the same model on both sides",
    "revision": "name the same revision (--model_revision) on both sides",
    "config_digest": "use the same config.json on both sides",
    "num_layers": "name the same model on both sides",
    "dtype": "use the same --dtype on both sides",
    "attn_implementation": "use the same --attn_implementation on both sides",
    "quantization": "name what the server's trunk has (split_quantization, serve --quantization)",
}


def disagreements(client: Agreement, server: Agreement) -> list[str]:
    """Return one sentence for each thing on which the two sides differ; none if they agree."""
    found = [
        f"{name} is '{getattr(client, name)}' at the client and '{getattr(server, name)}' at the "
        f"server: {remedy}"
        for name, remedy in _REMEDIES.items()
        # A folder has no revision; then the digests below speak.
        if getattr(client, name) != getattr(server, name)
        and not (name == "revision" and not (client.revision and server.revision))
    ]
    shared = sorted(set(client.layer_digests) & set(server.layer_digests))
    differing = [n for n in shared if client.layer_digests[n] != server.layer_digests[n]]
    if differing:
        found.append(
            f"the weights of layers {', '.join(map(str, differing))} differ between the two sides: "
            "load the same checkpoint on both sides"
        )
    if not (server.lower <= client.lower < client.upper <= server.upper):
        found.append(
            f"the client's trunk is layers {client.lower}:{client.upper} and the server holds "
            f"{server.lower}:{server.upper}: keep at least {server.lower} bottom and "
            f"{server.num_layers - server.upper} top layers "
            "(--split_bottom_layers, --split_top_layers)"
        )
    return found
