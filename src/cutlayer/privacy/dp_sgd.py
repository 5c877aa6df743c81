"""DP-SGD on the adapter that a client keeps (defense D4): against those who receive the adapter.

    private = make_private(model, optimizer, loader, epsilon=8, epochs=3, delta=1e-5, clip=0.1)
    for batch in private.data_loader:        # Poisson batches; one may be empty
        private.step(batch)
    print(private.guarantee())

Each example's gradient is clipped, the sum gets Gaussian noise, and examples are drawn by Poisson
sampling. Opacus's hooks find the per-example gradients of the LoRA's A and B, which are ordinary
`nn.Linear`; with a split model too, since the trunk treats every row by itself and so the rows of
the gradient that comes back are those of the examples.

What goes wrong with the ordinary loop, and why `step` makes the loss itself: transformers' loss is
a mean over the batch's tokens, so a long example makes the others' gradients smaller *before* they
are clipped, and taking one example away moves the sum by more than the clip. The loss here is each
example's own mean, and examples are summed.

It says nothing about the server. The server sees every batch's activations and, if the bottom
trains, their gradients, without noise; a trunk's adapter would be trained on them. Hence such a
model is refused: connect with train=("bottom", "top") or one of the two.

What is known to work: a learning rate 2 to 5 times the ordinary one, clip 0.1, batches of 512 and
more (`micro_batch` keeps the memory small), three epochs and more, no weight decay.

References:
    DP-SGD: Abadi et al., 2016, https://arxiv.org/abs/1607.00133
    Fine-tuning with it: Li et al., 2022, https://arxiv.org/abs/2110.05679
    Opacus: Yousefpour et al., 2021, https://arxiv.org/abs/2109.12298
    Noise and floating point: Holohan and Braghin, 2021, https://arxiv.org/abs/2107.10138
"""

# Shapes:  B examples

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cutlayer.errors import BudgetExhausted, ConfigError, NotFinite
from cutlayer.privacy.accountant import epsilon_of_adapter
from cutlayer.privacy.adapter_guarantee import Guarantee, planned_noise
from cutlayer.privacy.examples import (
    CollateOrEmpty,
    PoissonBatches,
    check_model,
    example_losses,
    refuse_left_padding,
    rows_in,
)
from cutlayer.privacy.noise import secure_normal, secure_uniform

__all__ = ["PrivateTraining", "make_private"]

Draw = Callable[[Sequence[int]], Tensor]
Losses = Callable[[Any, Mapping[str, Tensor]], Tensor]


class PrivateTraining:
    """A model, an optimizer and a loader of Poisson batches, tied together by `step`.

    Attributes:
        model: The model as it was given; hooks are on its trained layers while `step` runs.
        optimizer: Opacus's optimizer around the one that was given; schedules may set its `lr`.
        data_loader: One epoch of Poisson batches.
        noise_multiplier: Standard deviation of the noise, in units of the clip.
        steps: How many steps were done, those before this session included.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        hooks: Any,
        data_loader: DataLoader[Any],
        *,
        delta: float,
        sample_rate: float,
        steps: int,
        max_steps: int | None,
        losses: Losses,
        micro_batch: int | None,
        unit: str,
        formal: bool,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.data_loader = data_loader
        self.noise_multiplier: float = optimizer.noise_multiplier
        self.steps = steps
        self._hooks = hooks
        self._delta = delta
        self._sample_rate = sample_rate
        self._max_steps = max_steps
        self._losses = losses
        self._micro_batch = micro_batch
        self._unit = unit
        self._formal = formal
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        hooks.disable_hooks()

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Do one step of DP-SGD on a batch of `data_loader`; an empty one adds noise alone.

        Returns:
            The mean loss of the batch, 0 if it is empty. It is not covered by the guarantee.

        Raises:
            BudgetExhausted: If epsilon was given and its steps are done; nothing has changed.
            ConfigError: If the gradients of a layer are not one for every example.
            NotFinite: If a gradient is NaN or infinite; nothing has changed.
        """
        if self._max_steps is not None and self.steps >= self._max_steps:
            raise BudgetExhausted(
                f"step {self.steps + 1} is beyond the {self._max_steps} that epsilon was planned "
                "for: nothing was trained; release the adapter as it is, or plan again with more "
                "epochs or a larger epsilon"
            )
        rows = rows_in(batch)
        size = self._micro_batch or max(rows, 1)
        starts = range(0, rows, size) or [0]
        total = 0.0
        try:
            for start in starts:
                piece = {name: value[start : start + size] for name, value in batch.items()}
                total += self._differentiate(piece)
                # Opacus clips and sums each piece, and adds noise once, at the last.
                last = start == starts[-1]
                self.optimizer.signal_skip_step(do_skip=not last)
                self.steps += last  # counted before it is done, lest an error there hide it
                self.optimizer.step()
                self.optimizer.zero_grad()
        except BaseException:
            self._forget()
            raise
        return total / max(rows, 1)

    def per_example_gradients(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each trained parameter's gradient for every example alone, (B, *shape).

        Raises:
            ConfigError: If the gradients of a layer are not one for every example.
        """
        try:
            self._differentiate(batch)
            return {n: p.grad_sample.clone() for n, p in self._trained.items()}  # type: ignore[attr-defined]
        finally:
            self._forget()

    def guarantee(self) -> Guarantee:
        """Return what may be said of the adapter after the steps done so far.

        Raises:
            PrivacyError: If the two accountants contradict each other.
        """
        found = epsilon_of_adapter(
            self.noise_multiplier, self._sample_rate, self.steps, self._delta
        )
        return Guarantee(
            epsilon=found.pld,
            epsilon_rdp=found.rdp,
            delta=self._delta,
            noise_multiplier=self.noise_multiplier,
            clip=self.optimizer.max_grad_norm,
            sample_rate=self._sample_rate,
            steps=self.steps,
            unit=self._unit,
            accountant=f"dp-accounting {version('dp-accounting')}, PLD",
            formal=self._formal,
        )

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.cleanup()

    def _differentiate(self, batch: Mapping[str, Tensor]) -> float:
        """Leave each parameter's per-example gradients in its `grad_sample`; return the loss."""
        rows = rows_in(batch)
        if not rows:
            for parameter in self._trained.values():
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
            return 0.0
        refuse_left_padding(batch)
        self.model.train()  # the hooks of a layer in evaluation mode do nothing
        self._hooks.enable_hooks()
        try:
            output = self.model(**{n: v for n, v in batch.items() if n != "labels"})
            losses_B = self._losses(output, batch)
            if losses_B.shape != (rows,):
                raise ConfigError(
                    f"example_loss returned shape {tuple(losses_B.shape)} for {rows} examples: one "
                    "loss an example is needed"
                )
            losses_B.sum().backward()
        finally:
            self._hooks.disable_hooks()
        self._check(rows)
        return float(losses_B.detach().sum())

    def _check(self, rows: int) -> None:
        for name, parameter in self._trained.items():
            found = getattr(parameter, "grad_sample", None)
            if not isinstance(found, Tensor) or len(found) != rows:
                shape = tuple(found.shape) if isinstance(found, Tensor) else "none"
                raise ConfigError(
                    f"the per-example gradients of '{name}' have shape {shape} for {rows} examples:"
                    " this layer does not see one row an example (experts and flattened layers do "
                    "not), so leave it out of target_modules"
                )
            if not bool(torch.isfinite(found).all()):
                raise NotFinite(
                    f"a per-example gradient of '{name}' is NaN or infinite: nothing was changed; "
                    "lower the learning rate, or look at the sample"
                )

    def _forget(self) -> None:
        """Drop all that a forward or backward has left on layers and parameters."""
        for module in self.model.modules():
            for leftover in ("activations", "max_batch_len"):
                module.__dict__.pop(leftover, None)
        for parameter in self._trained.values():
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.__dict__.pop("_current_grad_sample", None)
            parameter.grad = parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]
        self.optimizer._step_skip_queue.clear()
        self.optimizer._is_last_step_skipped = False


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    *,
    delta: float,
    clip: float,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    steps_done: int = 0,
    example_loss: Losses = example_losses,
    micro_batch: int | None = None,
    unit: str = "one item of the dataset",
    seed: int | None = None,
) -> PrivateTraining:
    """Return training by DP-SGD of what `model` trains: a PEFT model, or a connected split one.

    Args:
        model: Its trained parameters must be those of plain linear layers, as a LoRA's are.
        optimizer: Over these parameters. With a split model, `attach` it first.
        data_loader: Its dataset, batch size B and collation are used; of N items each is drawn
            with probability B/N, and an epoch has N/B batches, rounded down.
        delta: Less than 1/N.
        clip: Bound of the norm of one example's gradient over all parameters.
        noise_multiplier: Standard deviation of the noise in units of the clip.
        epsilon: What all `epochs` or `steps` together may spend; further steps are refused. Without
            `noise_multiplier` the noise is found, with it it is checked.
        epochs: How many in all, with `epsilon`.
        steps: How many in all, in place of `epochs`.
        steps_done: Steps of the same run before this session, with the same noise.
        example_loss: From the model's output and the batch, one loss an example.
        micro_batch: At most so many examples go through the model at once.
        unit: An item, in words: who may be there or not. If a person has several items, one
            person is not covered by it.
        seed: Draw noise and batches from a seed, so that a run can be repeated. Whoever knows it
            can take the noise off: the guarantee is then void and says so.

    Raises:
        ConfigError: Naming all that is wrong with the arguments or the model.
    """
    try:
        from opacus.grad_sample import GradSampleHooks
        from opacus.optimizers import DPOptimizer
    except ImportError as error:
        raise ConfigError("DP-SGD needs Opacus: pip install 'cutlayer[dp]'") from error
    items = len(data_loader.dataset)  # type: ignore[arg-type]
    batch_size = data_loader.batch_size or 0
    _check_arguments(
        items, batch_size, delta, clip, noise_multiplier, epsilon, epochs or steps, steps_done,
        micro_batch,
    )  # fmt: skip
    check_model(model, optimizer)
    rate, batches = batch_size / items, items // batch_size
    max_steps = None if epsilon is None else steps or (epochs or 0) * batches
    noise_multiplier = planned_noise(noise_multiplier, epsilon, rate, max_steps, delta)
    normal: Draw = secure_normal
    uniform: Draw = secure_uniform
    if seed is not None:
        normal, uniform = _seeded(torch.randn, seed), _seeded(torch.rand, seed + 1)

    class Optimizer(DPOptimizer):
        """Opacus's, with noise that cannot be drawn again."""

        def add_noise(self) -> None:
            for parameter in self.params:
                # The half sum of four: no single float of the generator decides its last bits.
                noise = sum(normal(parameter.shape) for _ in range(4)) / 2
                noise *= self.noise_multiplier * self.max_grad_norm
                parameter.grad = parameter.summed_grad + noise.to(parameter.summed_grad)

    return PrivateTraining(
        model,
        Optimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=batch_size,
        ),
        GradSampleHooks(model, loss_reduction="sum"),
        DataLoader(
            data_loader.dataset,
            batch_sampler=PoissonBatches(items, rate, batches, uniform),
            collate_fn=CollateOrEmpty(data_loader.collate_fn),
            num_workers=data_loader.num_workers,
        ),
        delta=delta,
        sample_rate=rate,
        steps=steps_done,
        max_steps=max_steps,
        losses=example_loss,
        micro_batch=micro_batch,
        unit=unit,
        formal=seed is None,
    )


def _seeded(kind: Callable[..., Tensor], seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: kind(tuple(shape), generator=generator, dtype=torch.float64)


def _check_arguments(
    items: int,
    batch_size: int,
    delta: float,
    clip: float,
    noise_multiplier: float | None,
    epsilon: float | None,
    epochs: int | None,
    steps_done: int,
    micro_batch: int | None,
) -> None:
    faults = []
    if not 0 < batch_size <= items:
        faults.append(f"a batch size of {batch_size} for {items} items must be from 1 to that")
    if not 0 < delta < 1 / max(items, 1):
        faults.append(f"delta={delta} must be above 0 and less than 1/{items}, one in all items")
    if not (math.isfinite(clip) and clip > 0):
        faults.append(f"clip={clip} must be greater than 0")
    if noise_multiplier is None and epsilon is None:
        faults.append("give noise_multiplier, or epsilon and epochs")
    if noise_multiplier is None and steps_done:
        faults.append("a run that goes on keeps the noise of its first steps: give that")
    if noise_multiplier is not None and not (
        math.isfinite(noise_multiplier) and noise_multiplier > 0
    ):
        faults.append(f"noise_multiplier={noise_multiplier} must be greater than 0")
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
        faults.append(f"epsilon={epsilon} must be greater than 0")
    if epsilon is not None and not (epochs and epochs > 0):
        faults.append("epsilon is spent over a number of epochs or steps: give one of them")
    if steps_done < 0 or (micro_batch is not None and micro_batch < 1):
        faults.append(f"steps_done={steps_done} or micro_batch={micro_batch} is too small")
    if faults:
        raise ConfigError("; ".join(faults))
