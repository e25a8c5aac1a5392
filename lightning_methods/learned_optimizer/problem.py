"""What is unrolled: an inner training of particles by a learned optimizer, as a function of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument
from lightning_methods.learned_optimizer.architecture import Architecture
from lightning_methods.learned_optimizer.seeding import generator_of, seed_of
from lightning_methods.learned_optimizer.tasks import ModuleTask
from lightning_methods.learned_optimizer.unrolled import UnrolledOptimizer

State = dict[str, Tensor]


class Problem(Protocol):
    """A system that runs on under weights theta and has a loss at every step."""

    def begin(self, theta: Tensor, seeds: Sequence[int]) -> State:
        """Return the first state of `2 S` particles, of which s and s + S share seed s."""
        ...

    def unroll(
        self, theta: Tensor, state: State, t: int, steps: int, seeds: Sequence[int], *, differentiable: bool
    ) -> tuple[Tensor, State]:
        """Return the losses `(2 S, steps)` and the state after them."""
        ...


class InnerTraining:
    """The training of a task by a learned optimizer; the two particles of a pair share data, start and batches.

    Args:
        architecture: of the optimizer.
        task: what is trained, with data.
        outer_loss: whether the outer loss is taken on held-out samples (`"valid"`) or on those trained on (`"train"`).
        val_fraction: share of the samples that an inner training holds out, drawn anew for each pair.
        second_order: whether gradients of theta flow through the inner gradients.
        clock, width: see `UnrolledOptimizer`.
    """

    def __init__(
        self,
        architecture: Architecture,
        task: ModuleTask,
        *,
        outer_loss: str = "valid",
        val_fraction: float = 0.3,
        second_order: bool = True,
        clock: int | None = None,
        width: int | None = None,
    ) -> None:
        if task.inputs is None or task.targets is None:
            raise InvalidArgument(f"The task {task.name!r} has no data: give it samples, or train with a datamodule.")
        self.task, self.outer_loss, self.second_order = task, outer_loss, second_order
        self.inputs, self.targets = task.inputs, task.targets
        self.held_out = round(val_fraction * len(self.inputs)) if outer_loss == "valid" else 0
        if len(self.inputs) - self.held_out < 1 or (outer_loss == "valid" and self.held_out < 1):
            raise InvalidArgument(f"{len(self.inputs)} samples of {task.name!r} are too few to hold some out.")
        self.form = UnrolledOptimizer(architecture, task.shapes, clock, width)

    def begin(self, theta: Tensor, seeds: Sequence[int]) -> State:
        """Return parameters, optimizer state and split of the samples."""
        starts = [self.task.initial(seed_of(seed, "initial")) for seed in seeds]
        state = {f"p{i}": _doubled(torch.stack([s[i] for s in starts]).to(theta)) for i in range(len(self.task.names))}
        order = [torch.randperm(len(self.inputs), generator=generator_of(seed, "split")) for seed in seeds]
        return {**state, **self.form.begin(theta, 2 * len(seeds)), "order": torch.stack(order)}

    def unroll(
        self, theta: Tensor, state: State, t: int, steps: int, seeds: Sequence[int], *, differentiable: bool
    ) -> tuple[Tensor, State]:
        """Train for some steps; the loss of a step is that after its update.

        Args:
            theta: `(2 S, size)`.
            state: from `begin` or the unroll before.
            t: steps taken before.
            steps: to take.
            seeds: of the batches, one a pair.
            differentiable: whether the losses are to have gradients of theta.
        """
        params = [state[f"p{i}"] for i in range(len(self.task.names))]
        optimizer = {k: v for k, v in state.items() if k != "order" and not k.startswith("p")}
        train, outer = self._batches(state["order"], seeds, steps)
        losses = []
        with torch.set_grad_enabled(differentiable):
            for k in range(steps):
                grads = self._gradients(params, train[k], differentiable)
                params, optimizer = self.form.step(theta, params, grads, optimizer, t + k)
                losses.append(self.task.losses(params, *self._samples(outer[k], theta)))
        optimizer = {k: v.contiguous() for k, v in optimizer.items()}  # not a view of all inputs
        state = {**{f"p{i}": p for i, p in enumerate(params)}, **optimizer, "order": state["order"]}
        return torch.stack(losses, 1), state

    def _gradients(self, params: list[Tensor], rows: Tensor, differentiable: bool) -> list[Tensor]:
        with torch.enable_grad():
            if not differentiable or not self.second_order:
                leaves = [p.detach().requires_grad_() for p in params]
            else:
                leaves = [p if p.requires_grad else p.requires_grad_() for p in params]
            loss = self.task.losses(leaves, *self._samples(rows, params[0])).sum()
            return list(torch.autograd.grad(loss, leaves, create_graph=differentiable and self.second_order))

    def _batches(self, order: Tensor, seeds: Sequence[int], steps: int) -> tuple[Tensor, Tensor]:
        """Return which samples each step trains on and takes the outer loss on: `(steps, S, B)` both."""
        total, held_out, size = order.shape[1], self.held_out, self.task.batch_size
        train, outer = [], []
        for rows, seed in zip(order, seeds, strict=True):
            generator = generator_of(seed, "batches")
            own, other = rows[held_out:], rows[:held_out] if held_out else rows
            train.append(own[torch.randint(total - held_out, (steps, size), generator=generator)])
            outer.append(other[torch.randint(len(other), (steps, size), generator=generator)])
        return torch.stack(train, 1), torch.stack(outer, 1)

    def _samples(self, rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = self.inputs[rows], self.targets[rows]
        inputs = inputs.to(like) if inputs.is_floating_point() else inputs.to(like.device)
        return _doubled(inputs), _doubled(targets.to(like.device))


def _doubled(x: Tensor) -> Tensor:
    return torch.cat([x, x])
