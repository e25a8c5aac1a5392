"""Inner trainings: a network, its data, and a loss, for many particles at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from lightning_methods.errors import InvalidArgument, UnsupportedTraining
from lightning_methods.learned_optimizer.chain import as_chain

Loss = Callable[[Tensor, Tensor], Tensor]


class ModuleTask:
    """The training of a module, as a task for meta-training; each particle has parameters and batches of its own.

    Chains of linear layers, convolutions and layers without parameters run as batched matrix products, any other module
    by `torch.func`. The module is in eval mode, so that dropout does nothing.

    Args:
        module: the network. Its parameters are drawn anew for each inner training: by `initialize`, or by
            `reset_parameters` of its parts, else they start as they are.
        inputs: all samples, `(N, ...)`; None to take those of the datamodule, or of `MetaTraining(data=...)`.
        targets: `(N, ...)`.
        batch_size: of the inner training, also of the validation batch that the outer loss is taken on. Default 32.
        loss: mean loss of outputs and targets. Default cross-entropy.
        initialize: draws the parameters of a copy of the module, from torch's global generator.
        name: in logs; by default that of the class.

    Raises:
        InvalidArgument: if there is nothing to train, or sizes do not fit.
        UnsupportedTraining: if the module has buffers that change, as batch norm's.

    Example:
        >>> task = ModuleTask(nn.Linear(4, 3), torch.randn(20, 4), torch.arange(20) % 3, batch_size=8)
        >>> params = [torch.stack([p, p]) for p in task.initial(0)]
        >>> task.losses(params, torch.randn(2, 8, 4), torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        batch_size: int = 32,
        loss: Loss = F.cross_entropy,
        initialize: Callable[[nn.Module], Any] | None = None,
        name: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise InvalidArgument(f"batch_size={batch_size}: a positive number is needed.")
        if (inputs is None) != (targets is None) or (
            inputs is not None and targets is not None and len(inputs) != len(targets)
        ):
            raise InvalidArgument("As many inputs as targets are needed, or neither, for those of a datamodule.")
        self.module = copy.deepcopy(module).eval()
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.loss, self.initialize = batch_size, loss, initialize
        self.name = name or type(module).__name__
        trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if not trained:
            raise InvalidArgument(f"{self.name} has no parameter that requires a gradient.")
        changing = [n for n, m in self.module.named_modules() if getattr(m, "track_running_stats", False)]
        if changing:
            raise UnsupportedTraining(
                f"{self.name} has running statistics ({', '.join(changing[:3])}), which a differentiable inner "
                "training cannot update. Use GroupNorm or LayerNorm, or track_running_stats=False."
            )
        self.names = list(trained)
        self._chain = as_chain(self.module)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the parameters."""
        parameters = dict(self.module.named_parameters())
        return [tuple(parameters[name].shape) for name in self.names]

    @property
    def is_fast(self) -> bool:
        """Tell whether the module runs as batched matrix products."""
        return self._chain is not None

    def with_data(self, inputs: Tensor, targets: Tensor) -> ModuleTask:
        """Return the task on these samples, or itself where it has its own."""
        if self.inputs is not None:
            return self
        task = copy.copy(self)
        task.inputs, task.targets = inputs, targets
        return task

    def sample(self, seed: int) -> ModuleTask:
        """Return the task of an episode: itself. A family of tasks draws one."""
        return self

    def initial(self, seed: int) -> list[Tensor]:
        """Return the first parameters of one particle.

        Args:
            seed: of the draw; torch's own random state stays as it is.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.initialize is not None:
                self.initialize(self.module)
            else:
                for part in self.module.modules():
                    reset = getattr(part, "reset_parameters", None)
                    if callable(reset):
                        reset()
        parameters = dict(self.module.named_parameters())
        return [parameters[name].detach().clone() for name in self.names]

    def losses(self, params: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each particle.

        Shapes:
            parameters `(P, *shape)`, inputs and targets `(P, B, ...)` -> `(P,)`.
        """
        if self._chain is None:
            return vmap(self._loss_of_one)(tuple(params), inputs, targets)
        outputs = self._chain(dict(zip(self.names, params, strict=True)), inputs)
        if self.loss is F.cross_entropy and targets.ndim == 2:
            each = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
            return each.view(targets.shape).mean(1)
        return vmap(self.loss)(outputs, targets)

    def _loss_of_one(self, params: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        given = dict(zip(self.names, params, strict=True))
        return self.loss(functional_call(self.module, given, (inputs,)), targets)
