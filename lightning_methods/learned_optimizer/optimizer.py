"""A learned optimizer as a `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_methods.errors import (
    InvalidArgument,
    LightningMethodsWarning,
    NotFinite,
    UnsupportedTraining,
    check_choice,
)
from lightning_methods.learned_optimizer.chunks import Entry, memory_order
from lightning_methods.learned_optimizer.factored import factored_step
from lightning_methods.learned_optimizer.fast import Engine, Network, Settings
from lightning_methods.learned_optimizer.functional import DECAYS
from lightning_methods.learned_optimizer.fused import FusedEngine, is_usable
from lightning_methods.learned_optimizer.guard import Guard, inputs_of
from lightning_methods.learned_optimizer.unrolled import small_fc_shapes
from lightning_methods.learned_optimizer.weights import Weights, load_weights

_NONFINITE = ("skip", "zero", "raise", "propagate")
_LARGE = 1e15  # squares of larger numbers leave float32


class LearnedOptimizer(Optimizer):
    r"""An optimizer whose update rule was learned (Metz et al. 2019): a small network at every parameter.

    .. math:: p \leftarrow p - \mathrm{lr} \cdot c_s\, d\, e^{c_e m}, \qquad (d, m) = \mathrm{MLP}(\mathrm{features})

    Of normalised weights (`weights_card(name)` says so) the step of each tensor has the root mean square that a third
    output chooses. There is no learning rate to tune; `lr` multiplies the step, so that schedulers work.

    The guard, on by default, keeps it from diverging beyond what it was trained for, by falling back to Adam's step
    (learning rate `guard_lr`). Past the `clock` of the weights' card time stands still for the network, and the share
    of its step falls as one over time; in layers with more inputs than the card's `width` as one over their number. No
    element of it moves by more than `0.1 lr`. Where the running loss that the closure returns gives back a quarter of
    what was gained, half of its share is gone, and so on until all is; ranks decide by their mean loss.

    Args:
        params: parameters, or groups of them with `lr` and `weight_decay` of their own.
        lr: factor of the step. Default 1.
        weights: name of shipped weights (`available_weights()`), or the path of a file by `MetaTraining.export`.
        weight_decay: decoupled: parameters shrink by `lr * weight_decay` before the step. With `lr=1` that is large at
            the values usual for AdamW: its `lr * weight_decay` is the one to set.
        max_grad_norm: gradients count as scaled to at most this norm, all together; they are not changed.
        maximize: whether to go uphill.
        nonfinite: what to do with gradients that are not finite: `"skip"` the step (counted in `skipped_steps`),
            `"zero"` those elements, `"raise"`, or `"propagate"` them.
        guard: see above. State is six floats a parameter, and a seventh once Adam has a share of its step.
        guard_lr: learning rate of the Adam step that is fallen back to, times `lr`. Long trainings end with it.
        features, hidden_size, hidden_layers: what the weights must be, where that is to be checked.

    Raises:
        InvalidArgument: if an argument is out of range, or there are no such weights: those that exist are listed.
        ShapeMismatch: if a file's numbers do not fit its architecture.
        UnsupportedTraining: for complex, sparse and sharded parameters or gradients.

    Example:
        >>> net = torch.nn.Linear(4, 3)
        >>> optimizer = LearnedOptimizer(net.parameters())
        >>> net(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()

    Deviations from the paper: the guard; normalised steps; weights of small networks, from minutes on a CPU.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        weights: str | Path | Mapping[str, Any] | Weights = "lm-small",
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        nonfinite: Literal["skip", "zero", "raise", "propagate"] = "skip",
        guard: bool = True,
        guard_lr: float = 1e-3,
        features: str | None = None,
        hidden_size: int | None = None,
        hidden_layers: int | None = None,
    ) -> None:
        check_choice("nonfinite", nonfinite, _NONFINITE)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise InvalidArgument(f"max_grad_norm={max_grad_norm}: a positive number, or None, is needed.")
        self.weights = load_weights(weights)
        wanted = {"features": features, "hidden_size": hidden_size, "hidden_layers": hidden_layers}
        for name, value in wanted.items():
            own = getattr(self.weights.architecture, name)
            if value is not None and value != own:
                raise InvalidArgument(f"{name}={value!r}, but the weights {self.weights.name!r} have {name}={own!r}.")
        self.nonfinite, self.max_grad_norm = nonfinite, max_grad_norm
        self.guard = Guard(lr=guard_lr) if guard else None
        self.skipped_steps = 0
        self._networks: dict[tuple[torch.dtype, torch.device], Network] = {}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their time begins at zero.

        Args:
            param_group: `params`, and settings that differ.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay"):
            if not 0 <= float(group[name]) < float("inf"):
                self.param_groups.pop()
                raise InvalidArgument(f"{name}={group[name]}: a number that is not negative is needed.")
        for p in group["params"]:
            _check_parameter(p)

    @property
    def learned_share(self) -> float:
        """Share of the learned step in the last one, mean over the elements that took one; the rest is Adam's."""
        trained = [(int(state["step"]), p) for p, state in self.state.items() if state.get("step", 0) > 0]
        total = sum(self._share(step - 1, p) * p.numel() for step, p in trained)
        return total / sum(p.numel() for _, p in trained) if trained else 1.0

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: computes the loss and its gradients, and returns the loss, which the guard watches.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = [self._entries(group) for group in self.param_groups]
        norm = self._norm([e.gradient for group in entries for e in group])
        if norm is not None and not norm < float("inf"):
            if not self._admits(entries):
                return loss
            norm = self._norm([e.gradient for group in entries for e in group])
        self._observe(loss)
        factor = 1.0
        if self.max_grad_norm is not None and norm is not None and norm > self.max_grad_norm:
            factor = self.max_grad_norm / norm
        for group, own in zip(self.param_groups, entries, strict=True):
            if own:
                self._step_group(group, own, -factor if group["maximize"] else factor)
        return loss

    def _entries(self, group: dict[str, Any]) -> list[Entry]:
        entries = []
        for p in group["params"]:
            if p.grad is None or not p.numel():
                continue
            if p.grad.is_sparse or p.grad.layout != torch.strided:
                raise UnsupportedTraining(
                    "LearnedOptimizer does not support sparse gradients. Use nn.Embedding(sparse=False), or give those "
                    "parameters to torch.optim.SparseAdam."
                )
            if p.grad.is_complex():
                raise UnsupportedTraining(
                    "LearnedOptimizer does not support complex gradients. Use torch.view_as_real."
                )
            entries.append(Entry(p, p.grad, self._state_of(p)))
        return entries

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if "step" not in state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.int64)
            if self.weights.architecture.features == "small_fc":
                for name, shape in small_fc_shapes(p.shape).items():
                    state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
            else:
                # in the parameter's order of memory, so that both flatten without a copy
                order = memory_order(p)
                back = [0, *(order.index(i) + 1 for i in range(p.ndim))]
                rows = torch.zeros(len(DECAYS), *(p.shape[i] for i in order), dtype=dtype, device=p.device)
                state["momenta"] = rows.permute(back)
        return state

    def _step_group(self, group: dict[str, Any], entries: list[Entry], factor: float) -> None:
        lr = float(group["lr"])
        if group["weight_decay"]:
            torch._foreach_mul_([e.parameter for e in entries], 1 - lr * group["weight_decay"])
        total = sum(e.parameter.numel() for e in entries)
        steps = [e.state["step"] for e in entries]
        together: dict[Any, list[Entry]] = {}
        for entry, t in zip(entries, torch.stack(steps).tolist(), strict=True):
            p = entry.parameter
            together.setdefault((t, p.dtype, p.device, entry.gradient.dtype), []).append(entry)
        torch._foreach_add_(steps, 1)
        for (t, *_), own in together.items():
            own = [self._shared(t, e) for e in own]
            settings, network = self._settings(t, lr, factor), self._network(own[0].parameter)
            if isinstance(network, Engine):
                network.update(own, settings, total)
                continue
            for entry in own:
                factored_step(network, entry, settings)

    def _share(self, t: int, p: Tensor) -> float:
        """Return the share of the learned step in the step of a tensor."""
        if self.guard is None:
            return 1.0
        return self.guard.share(t, self.weights.clock, inputs_of(p.shape), self.weights.width)

    def _shared(self, t: int, entry: Entry) -> Entry:
        """Return it with the share of the learned step; where that is not all, Adam's second moment begins."""
        share = self._share(t, entry.parameter)
        if share == 1:
            return entry
        p, state = entry.parameter, entry.state
        if "adam_step" not in state:
            state["second_moment"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            state["adam_step"] = torch.zeros((), dtype=torch.int64)
        state["adam_step"] += 1
        return entry._replace(share=share, age=int(state["adam_step"]))

    def _settings(self, t: int, lr: float, factor: float) -> Settings:
        if self.guard is None:
            return Settings(t, lr, factor)
        time = min(t, self.weights.clock or t)
        return Settings(time, lr, factor, self.guard.lr * lr, self.guard.step_limit * lr)

    def _network(self, p: Tensor) -> Network:
        key = (torch.promote_types(p.dtype, torch.float32), p.device)
        if key not in self._networks:
            a = self.weights.architecture
            make = Network if a.features == "small_fc" else FusedEngine if is_usable(a, *key) else Engine
            self._networks[key] = make(a, self.weights.theta, *key)
        return self._networks[key]

    # -- gradients that are not finite, and the running loss -----------------------------------------------------------

    def _norm(self, gradients: list[Tensor]) -> float | None:
        """Return the norm of all gradients, or None where nobody asks."""
        if not gradients or (self.nonfinite == "propagate" and self.max_grad_norm is None):
            return None
        norms = torch._foreach_norm(gradients)
        if len({n.device for n in norms}) > 1:
            norms = tuple(n.to(norms[0].device) for n in norms)
        largest = torch.stack(norms).norm(dtype=torch.float64)
        if bool(largest < _LARGE):
            return float(largest)
        squares = [g.double().square().sum().to(norms[0].device) for g in gradients]
        return float(torch.stack(squares).sum().sqrt())

    def _admits(self, entries: list[list[Entry]]) -> bool:
        """Tell whether to go on with gradients of which some are not finite."""
        if self.nonfinite == "raise":
            raise UnsupportedTraining(
                "A gradient is not finite. Lower the learning rate of what produced it, clip, or set nonfinite='skip'."
            )
        if self.nonfinite == "skip":
            if not self.skipped_steps:
                warnings.warn(
                    "LearnedOptimizer skips steps with gradients that are not finite; skipped_steps counts them. "
                    "This is said once.",
                    NotFinite,
                )
            self.skipped_steps += 1
            return False
        if self.nonfinite == "zero":
            for group in entries:
                for i, e in enumerate(group):
                    group[i] = e._replace(gradient=e.gradient.nan_to_num(0.0, 0.0, 0.0))
        return True

    def _observe(self, loss: Any) -> None:
        if self.guard is None or loss is None:
            return
        value = torch.as_tensor(loss).detach().double()
        if value.numel() != 1:
            return
        value = value.reshape(())
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # in the device's own precision: not every backend has float64
            shared = value.to(torch.as_tensor(loss).device, torch.float32)
            dist.all_reduce(shared)
            value = shared / dist.get_world_size()
        self.guard.observe(float(value))

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the fingerprint of the weights and what the guard has seen."""
        return super().state_dict() | {
            "learned_optimizer": {
                "weights": self.weights.name,
                "fingerprint": self.weights.fingerprint,
                "skipped_steps": self.skipped_steps,
                "guard": None if self.guard is None else self.guard.state_dict(),
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state, in the precision it was saved in.

        Args:
            state_dict: by `state_dict`.

        Raises:
            InvalidArgument: if it is another optimizer's.
        """
        own = state_dict.get("learned_optimizer")
        if own is None:
            raise InvalidArgument("This is the state of another optimizer: there is no 'learned_optimizer' in it.")
        if own["fingerprint"] != self.weights.fingerprint:
            warnings.warn(
                f"The state was saved with the weights {own['weights']!r} and is taken up with {self.weights.name!r}, "
                "which differ. Give LearnedOptimizer the former to go on as before.",
                LightningMethodsWarning,
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "learned_optimizer"})
        # torch casts the state to the type of the parameters, which is too coarse for bf16
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                where = "cpu" if name in ("step", "adam_step") else p.device
                self.state[p][name] = value.detach().clone().to(where)
        self.skipped_steps = own["skipped_steps"]
        if self.guard is not None and own["guard"] is not None:
            self.guard.load_state_dict(own["guard"])

    def __getstate__(self) -> dict[str, Any]:
        names = ("weights", "nonfinite", "max_grad_norm", "guard", "skipped_steps")
        return super().__getstate__() | {name: getattr(self, name) for name in names} | {"_networks": {}}


def _check_parameter(p: Tensor) -> None:
    if p.is_complex():
        raise UnsupportedTraining("LearnedOptimizer does not support complex parameters. Use torch.view_as_real.")
    if not p.is_floating_point():
        raise UnsupportedTraining(f"LearnedOptimizer trains floating point parameters; one is {p.dtype}.")
    if p.layout != torch.strided:
        raise UnsupportedTraining("LearnedOptimizer does not support sparse parameters. Use dense ones.")
    if hasattr(p, "device_mesh") or hasattr(p, "_is_flat_param"):
        raise UnsupportedTraining(
            "A parameter is sharded (FSDP or tensor parallel); its inputs are normalised over the whole tensor, of "
            "which this process has a part. Use DDP, or another optimizer."
        )
