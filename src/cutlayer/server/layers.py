"""How a tenant's layers run where a backward follows: as they are, computed again, or compiled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from cutlayer.errors import ConfigError

__all__ = ["TrainedLayers", "refuse_without_compiler"]

_FORMS = 64
"""Of a layer's code that are compiled at most: each LoRA config, dtype and kind of mask is one."""


class TrainedLayers:
    """The layers of a tenant's own tree."""

    def __init__(self, layers: Sequence[nn.Module], *, checkpoints: bool, compiles: bool) -> None:
        """Prepare them.

        Args:
            layers: The layers, whose `forward` may be replaced.
            checkpoints: Keep layer inputs only and compute the rest again.
            compiles: Let Inductor fuse what is between the matrix products.
        """
        self._compiled = [(layer, _compiled(layer)) for layer in layers] if compiles else []
        if checkpoints:
            known = dict(self._compiled)
            for layer in layers:
                layer.__dict__["forward"] = functools.partial(
                    _checkpointed, layer, known.get(layer, _plain(layer))
                )
            self._compiled = []  # within what is computed again

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """While open, layers run compiled, if they were asked to be."""
        for layer, forward in self._compiled:
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer, _ in self._compiled:
                layer.__dict__.pop("forward", None)


def _plain(layer: nn.Module) -> Callable[..., Any]:
    return MethodType(type(layer).forward, layer)


def _compiled(layer: nn.Module) -> Callable[..., Any]:
    # All layers of all tenants run the same code, so what was compiled for one serves the others.
    torch._dynamo.config.recompile_limit = _FORMS
    # A layer that cannot be compiled runs as it is.
    torch._dynamo.config.suppress_errors = True
    # Dropout draws the numbers that it draws without the compiler.
    return torch.compile(_plain(layer), dynamic=True, options={"fallback_random": True})


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return _plain(layer)(*args, **kwargs)
    # As transformers does: the model has the KV cache for its masks, and what is computed again
    # must not extend it twice.
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {n: None if isinstance(value, Cache) else value for n, value in kwargs.items()}
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def refuse_without_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        ConfigError: If this machine cannot.
    """
    told = torch.ones(8, device=device)
    try:
        with torch._dynamo.config.patch(suppress_errors=False):  # a trunk of this process set it
            torch.compile(lambda x: (x * 2).sin().sum())(told)
    except Exception as error:
        raise ConfigError(
            f"--torch_compile cannot be used here ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}): install a C++ compiler (g++), or leave it out"
        ) from None
