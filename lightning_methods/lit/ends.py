"""The ends of a network: what lies outside of its sections, copied from the teacher and frozen at first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_methods.lit.sections import Stage


class Ends:
    """The ends of a student: `copy` takes them from the teacher, `freeze` and `thaw` say whether they may change.

    Frozen parameters keep `requires_grad`, since DDP breaks where it changes within a fit; `drop_gradients` before the
    optimizer's step makes the optimizer pass them by, with its weight decay and its momentum. Frozen modules are in
    eval mode, as in the paper's code: batch norm stands still, and dropout drops nothing.

    Args:
        student: the network.
        stages: its sections.

    Example:
        >>> from lightning_methods.lit.sections import find_stage
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
        >>> ends = Ends(net, [find_stage(net, "1", "student")])
        >>> sorted(ends.names)
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    def __init__(self, student: nn.Module, stages: Sequence[Stage]) -> None:
        self.student = student
        self.stages = list(stages)
        self.copied: set[str] = set()
        self._modes: list[tuple[nn.Module, bool]] | None = None
        self._frozen: list[nn.Parameter] = []
        self._witness: nn.Module | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of the parameters and buffers outside of the sections."""
        return list(_outside(self.student, self.stages))

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters outside of the sections, or those that were copied where some were."""
        named = _outside(self.student, self.stages)
        return [x for n, x in named.items() if isinstance(x, nn.Parameter) and (not self.copied or n in self.copied)]

    def copy(self, teacher: nn.Module, stages: Sequence[Stage], *, only_names: bool = False) -> list[str]:
        """Take every tensor that the teacher has outside of its sections under the same name and of the same shape.

        Args:
            teacher: the network to take from.
            stages: its sections.
            only_names: whether to note only what has a counterpart, since a checkpoint has brought the values.

        Returns:
            The names of the student's tensors that the teacher has not so.
        """
        theirs = _outside(teacher, stages)
        left: list[str] = []
        self.copied.clear()
        with torch.no_grad():
            for name, tensor in _outside(self.student, self.stages).items():
                if name in theirs and theirs[name].shape == tensor.shape:
                    if not only_names:
                        tensor.copy_(theirs[name])
                    self.copied.add(name)
                else:
                    left.append(name)
        return left

    def freeze(self) -> None:
        """Put the modules outside of the sections into eval mode, each by itself; harmless when called twice."""
        if self._modes is None:
            self._modes = [(m, m.training) for m in self._still()]
            self._frozen = self.parameters()
            trained = (m for stage in self.stages for m in stage.submodules() if m.training)
            self._witness = next(trained, None)
        for module, _ in self._modes:
            module.training = False

    def _still(self) -> Iterator[nn.Module]:
        """Yield the modules outside of the sections, but those with tensors of their own that were not copied."""
        inside = {id(m) for stage in self.stages for m in stage.submodules()}
        for path, module in self.student.named_modules():
            prefix = f"{path}.".replace("_orig_mod.", "").removeprefix(".")
            own = [*module._parameters, *(set(module._buffers) - module._non_persistent_buffers_set)]
            trained = self.copied and any(f"{prefix}{name}" not in self.copied for name in own)
            if id(module) not in inside and not trained:
                yield module

    @property
    def is_frozen(self) -> bool:
        """Tell whether the ends stand still."""
        return self._modes is not None

    def thaw(self) -> None:
        """Put the modules back into the modes that they had; harmless when called twice."""
        # after a crash in validation all of the network is in eval mode, and stays in it
        evaluated = self._witness is not None and not self._witness.training
        for module, training in self._modes or ():
            module.training = training and not evaluated
        self._modes, self._frozen, self._witness = None, [], None

    def drop_gradients(self) -> None:
        """Leave nothing of frozen ends for the optimizer, the clipping and the weight decay to act on."""
        for parameter in self._frozen:
            parameter.grad = None


def _outside(network: nn.Module, stages: Sequence[Stage]) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers outside of the sections, under the names that the user gave."""
    inside = {id(x) for stage in stages for m in stage.modules for x in (*m.parameters(), *m.buffers())}
    found: dict[str, Tensor] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in inside:
            found[name.replace("_orig_mod.", "")] = tensor
    return found
