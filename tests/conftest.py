"""What the whole suite shares: one thread, no hub, tiny models, one authority, served trunks."""

from __future__ import annotations

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cutlayer.cli.certs import issue, make_authority
from tests.site import Site, site_of
from tests.tiny import tiny_model

QUIETLY = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded() -> None:
    """Compute on one thread, so that sums have one order, and leave out transformers' advice."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Begin each test at the same seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def measured(record_property: Any) -> Callable[..., None]:
    """Return a function that notes figures of an acceptance test, which `--junitxml` writes.

    benchmarks/acceptance collects them; what a test demands of them stands in the test.
    """

    def note(**figures: float) -> None:
        for name, value in figures.items():
            record_property(name, float(value))

    return note


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a tiny model to a folder, once a type and setting."""
    made: dict[tuple[object, ...], Path] = {}

    def write(
        model_type: str,
        *,
        task: str = "causal-lm",
        seed: int = 0,
        layers: int = 6,
        sharded: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        key = (model_type, task, seed, layers, sharded, dtype)
        if key not in made:
            model = tiny_model(model_type, task=task, num_layers=layers, seed=seed, dtype=dtype)
            made[key] = tmp_path_factory.mktemp("models") / f"{model_type}-{len(made)}"
            # A shard holds about one layer, so that some shards are of one side only.
            model.save_pretrained(made[key], max_shard_size="60KB" if sharded else "5GB")
        return made[key]

    return write


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a server's certificate and those of two clients."""
    folder = tmp_path_factory.mktemp("certs")
    make_authority(folder)
    issue(folder, "server", hosts=["localhost", "127.0.0.1"], server=True)
    issue(folder, "ward-a")
    issue(folder, "ward-b")
    return folder


@pytest.fixture(scope="session")
def serve(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    """Return a function that serves a folder over TLS, once a folder and setting."""
    sites: dict[tuple[object, ...], Site] = {}

    def start(folder: Path, **settings: object) -> Site:
        key = (folder, *sorted(settings.items()))
        if key not in sites:
            state_dir = tmp_path_factory.mktemp("state")
            sites[key] = site_of(folder, certs, state_dir, **settings)
        return sites[key]

    yield start
    for site in sites.values():
        site.server.stop(grace_s=0.5)


@pytest.fixture(scope="session")
def llama(folder_of: Callable[..., Path], serve: Callable[..., Site]) -> Site:
    """A small Llama of six layers with grouped heads, of which a server holds layers 1 to 4."""
    return serve(folder_of("llama"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium as the system has it; playwright brings no browser of its own."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path is not None, "no Chromium here: apt-get install chromium"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=QUIETLY)
        yield launched
        launched.close()
