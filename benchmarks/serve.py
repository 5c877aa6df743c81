"""A server of its own process for the benchmarks: one JSON argument, its port on standard output.

It stands where `cutlayer serve` would, and ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import cpu_seconds, memory_bytes


def main() -> None:
    """Serve until standard input ends; answer each line with CPU seconds and memory."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    from cutlayer.server.access import server_credentials
    from cutlayer.server.app import make_server

    server = make_server(
        spec["model"],
        bottom_layers=spec["bottom_layers"],
        top_layers=spec["top_layers"],
        credentials=server_credentials(
            Path(spec["server_cert"]), Path(spec["server_key"]), Path(spec["ca"])
        ),
        state_dir=Path(spec["state_dir"]),
        host="127.0.0.1",
        port=0,
    )
    print(json.dumps({"port": server.port}), flush=True)
    for _line in sys.stdin:
        answer = {"cpu_s": cpu_seconds("self"), **memory_bytes()}
        print(json.dumps(answer), flush=True)
    server.stop()


if __name__ == "__main__":
    main()
