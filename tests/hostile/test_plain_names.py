"""What a client may put its LoRA on is named plainly: nothing is matched or imported."""

from __future__ import annotations

import pytest

from cutlayer.client.address import Address
from cutlayer.client.connection import Connection
from cutlayer.errors import ConfigError
from cutlayer.wire import cutlayer_pb2 as pb
from tests.site import Site

NAMES = [
    r".*q_proj",
    r"model.layers.2.self_attn.(q|k)_proj",
    "q_proj",
    "model.layers.0.self_attn.q_proj",  # the server's cut leaves layer 0 to the client
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.2.mlp.act_fn",
    "os.system",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_names_of_the_trunks_modules_are_accepted(llama: Site, name: str):
    """A pattern, an import path, or a module of the client's or of no weights is ConfigError."""
    connection = Connection(Address(llama.address, ca=llama.certs / "ca.pem"))
    lora = pb.LoraSpec(modules=[pb.LoraModule(name=name, rank=2, alpha=2.0)])
    asked = pb.OpenSessionRequest(agreement=connection.offer.agreement, run="names", lora=lora)

    with pytest.raises(ConfigError):
        connection.open(asked)

    connection.close()
