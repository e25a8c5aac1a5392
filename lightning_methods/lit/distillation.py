"""The step of LIT, for the module and for the callback: a teacher's pass, and the student's sections on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_methods.core.passes import preserved
from lightning_methods.errors import InvalidArgument, ShapeMismatch, TensorOverwritten, UnsupportedTraining
from lightning_methods.lit.adapters import Adapter
from lightning_methods.lit.capture import Call, SectionTap, versions_of
from lightning_methods.lit.early import early_loss
from lightning_methods.lit.functional import SectionLoss, mean_squares, relative_error, section_loss
from lightning_methods.lit.matching import observed, section_table
from lightning_methods.lit.norms import statistics_kept
from lightning_methods.lit.sections import Pair, tensors_in

Statistics = Literal["auto", "student", "both", "teacher"]

_OVERWRITTEN = (
    "The section {name!r} of the {kind} changes its input in place, or what follows it changes its output. Set "
    "clone_features=True, which keeps copies."
)


@dataclass(frozen=True)
class Lesson:
    """One pass of the teacher: what it returned, and what went through its sections."""

    output: Any
    calls: list[Call]


@dataclass(frozen=True)
class SectionOutcome:
    """The loss of one section, in the graph, and out of it the mean squares of its error and of its target."""

    loss: Tensor
    error: Tensor
    size: Tensor

    @property
    def relative(self) -> Tensor:
        """Return the error as a share of the target."""
        return self.error / self.size.clamp(min=torch.finfo(self.size.dtype).tiny)


class SectionDistillation:
    """The sections of one student under one teacher.

    Between `attach` and `detach` there are hooks on both networks. A step opens `lesson(...)`, asks for `fed_losses`,
    runs the student itself within `own_pass()`, and asks for `own_losses`.

    Args:
        teacher: run in eval mode without gradient; never changed.
        student: the network that is trained.
        pairs: the sections.
        fed_by: whether sections get the `"teacher"`'s input (LIT) or the `"student"`'s own (FitNets).
        loss: of a section, see `intermediate_loss`.
        weights: of the sections, default 1.
        statistics: which pass updates the running statistics of the student's sections.
        adapters: one a section where widths differ.
        clone: whether features are copied before anything can overwrite them; `"auto"` finds out.
        early: whether the gradient of each section is taken at once, so that its graph is freed.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        pairs: Sequence[Pair],
        *,
        fed_by: Literal["teacher", "student"] = "teacher",
        loss: SectionLoss = "mse",
        weights: Sequence[float] | None = None,
        statistics: Literal["student", "both", "teacher"] = "student",
        adapters: Sequence[Adapter] | None = None,
        clone: bool | Literal["auto"] = "auto",
        early: bool = False,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.pairs = list(pairs)
        self.fed_by = fed_by
        self.loss = loss
        self.weights = [1.0] * len(self.pairs) if weights is None else [float(w) for w in weights]
        self.statistics = statistics
        self.adapters = adapters
        self.clone = clone
        self.early = early
        self.teacher_tap = SectionTap([p.teacher for p in self.pairs], "teacher")
        self.student_tap = SectionTap([p.student for p in self.pairs], "student")
        self.reuse = self.is_inspected = False
        self._clone_lesson = self._clone_own = clone is True
        self._clone_inputs: set[int] = set()

    def attach(self) -> None:
        """Register the hooks of both networks; harmless when called twice."""
        self.teacher_tap.attach()
        self.student_tap.attach()

    def detach(self) -> None:
        """Remove them, and forget what was found out about the networks."""
        self.teacher_tap.detach()
        self.student_tap.detach()
        self.reuse = self.is_inspected = False
        self._clone_lesson = self._clone_own = self.clone is True
        self._clone_inputs = set()

    @property
    def listens(self) -> bool:
        """Tell whether what the student's own pass gives counts: for all sections, or for the first one."""
        return self.reuse or self.fed_by == "student"

    # -- the teacher -------------------------------------------------------------------------------------------------

    @contextmanager
    def lesson(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Lesson]:
        """Run the teacher and yield what came out; its features are dropped at the end.

        Args:
            args: what the networks are given.
            kwargs: what they are given by name.

        Raises:
            TensorOverwritten: if a network overwrites its features and copies were ruled out.
        """
        with self.teacher_tap.recording(clone=self._clone_lesson) as calls:
            output = self.run_teacher(args, kwargs)
            found = calls()
            if not any(call.is_overwritten() for call in found):
                yield Lesson(output, found)
                return
        if self.clone is False:
            worst = next(p for p, call in zip(self.pairs, found, strict=True) if call.is_overwritten())
            raise TensorOverwritten(_OVERWRITTEN.format(name=worst.teacher.path, kind="teacher"))
        self._clone_lesson = True
        with self.lesson(args, kwargs) as lesson:
            yield lesson

    def run_teacher(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the teacher gives, in eval mode whatever was done to it, and without a graph."""
        if any(module.training for module in self.teacher.modules()):
            self.teacher.eval()
        with torch.no_grad():  # not inference_mode, whose tensors no section can be trained on
            return self.teacher(*args, **kwargs)

    # -- the student -------------------------------------------------------------------------------------------------

    @contextmanager
    def own_pass(self) -> Iterator[Callable[[], list[Call]]]:
        """Yield, for the student's own pass, what returns its sections' calls; its statistics may be another pass's."""
        others = self._submodules(1 if self.reuse else 0) if self.statistics == "teacher" else ()
        with statistics_kept(others), self.student_tap.recording(clone=self._clones_own) as calls:
            yield calls

    @property
    def _clones_own(self) -> bool:
        # nothing is known of the student before it was looked at
        return self._clone_own or (self.clone == "auto" and not self.is_inspected)

    def fed_losses(self, lesson: Lesson) -> dict[str, SectionOutcome]:
        """Run the student's sections on the teacher's inputs and return their losses by name.

        Where `reuse` says so, the first one is left to `own_losses`.
        """
        if self.fed_by == "student":
            return {}
        first = 1 if self.reuse else 0
        kept = self.statistics == "student"
        with statistics_kept(self._submodules(first) if kept else ()):
            return {self.pairs[i].name: self._fed(i, lesson.calls[i]) for i in range(first, len(self.pairs))}

    def own_losses(self, lesson: Lesson, own: Sequence[Call]) -> dict[str, SectionOutcome]:
        """Return the losses of the sections as they ran in the student's own pass: of all, of the first, or of none."""
        count = len(self.pairs) if self.fed_by == "student" else int(self.reuse)
        outcomes = {}
        for i in range(count):
            if own[i].is_overwritten():
                raise TensorOverwritten(_OVERWRITTEN.format(name=self.pairs[i].student.path, kind="student"))
            output, target = self._adapted(i, own[i].tensor, lesson.calls[i].tensor)
            outcomes[self.pairs[i].name] = self._outcome(i, output, target)
        return outcomes

    def total(self, outcomes: dict[str, SectionOutcome]) -> Tensor:
        """Return the weighted sum of the sections' losses."""
        by_name = dict(zip((p.name for p in self.pairs), self.weights, strict=True))
        return torch.stack([by_name[name] * outcome.loss for name, outcome in outcomes.items()]).sum()

    def drift(self, lesson: Lesson, own: Sequence[Call]) -> dict[str, Tensor]:
        """Return each section's relative error on the student's own input and, where it fits, on the teacher's."""
        errors = {}
        for i, pair in enumerate(self.pairs):
            output, target = self._adapted(i, own[i].tensor, lesson.calls[i].tensor)
            errors[f"student_fed/{pair.name}"] = relative_error(output, target)
            if self.adapters is None or self.fed_by == "teacher":
                errors[f"teacher_fed/{pair.name}"] = relative_error(*self._run(i, lesson.calls[i]))
        return errors

    # -- the first step ----------------------------------------------------------------------------------------------

    def inspect(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, reuse: bool) -> None:
        """Look at both networks on one batch without changing them, and say clearly what does not fit.

        Args:
            args: what the networks are given.
            kwargs: what they are given by name.
            reuse: whether the student's part before its sections stands still, so that, where it gives what the
                teacher's gives, its first section need not run twice.

        Raises:
            InvalidArgument: if the teacher gives what is not finite.
            ShapeMismatch: if the sections do not fit together, with a table of them.
            UnsupportedTraining: if a section is given a cache that it would change.
        """
        self.is_inspected = False
        with preserved(self.student), torch.no_grad(), self.lesson(args, kwargs) as lesson:
            self.student.eval()
            self._check(lesson)
            own: list[Call] | None = None
            if reuse or self.fed_by == "student":
                own = self._own_calls(args, kwargs)
                self.reuse = reuse and self.fed_by == "teacher" and _same(lesson.calls[0], own[0])
            try:
                shapes = [self._shapes(i, lesson.calls[i], own) for i in range(len(self.pairs))]
            except (RuntimeError, ValueError) as error:
                self._refuse(lesson, args, kwargs, error)
            if any(a != b for a, b in shapes):
                self._refuse(lesson, args, kwargs, None)
        self.is_inspected = True

    def _own_calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
        with self.student_tap.recording(clone=self._clone_own) as calls:
            self.student(*args, **kwargs)
            found = calls()
        if self.clone != "auto" or self._clone_own or not any(call.is_overwritten() for call in found):
            return found
        self._clone_own = True
        return self._own_calls(args, kwargs)

    def _check(self, lesson: Lesson) -> None:
        for pair, call in zip(self.pairs, lesson.calls, strict=True):
            if not bool(torch.isfinite(call.tensor).all()):
                raise InvalidArgument(
                    f"The section {pair.teacher.path!r} of the teacher gives NaN or infinite values. Was its "
                    f"checkpoint loaded, and are the inputs scaled as it needs them?"
                )
            caches = [k for k, v in call.kwargs.items() if ("cache" in k or "past_key" in k) and hasattr(v, "update")]
            if caches:
                raise UnsupportedTraining(
                    f"The section {pair.teacher.path!r} is given {caches}, which the student's section would change. "
                    f"Call the networks without a cache, for instance with use_cache=False."
                )

    def _shapes(self, i: int, call: Call, own: Sequence[Call] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.fed_by == "student" and own is not None:
            output, target = self._adapted(i, own[i].tensor, call.tensor)
            return tuple(output.shape), tuple(target.shape)
        before = versions_of((call.args, call.kwargs))
        # what overwrites its input in training only shows by its setting
        inplace = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.inplace for m in self._submodules(i, i + 1))
        output, target = self._run(i, call)
        if inplace or before != versions_of((call.args, call.kwargs)):
            if self.clone is False:
                raise TensorOverwritten(_OVERWRITTEN.format(name=self.pairs[i].student.path, kind="student"))
            self._clone_inputs.add(i)
        return tuple(output.shape), tuple(target.shape)

    def _refuse(self, lesson: Lesson, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception | None) -> None:
        if isinstance(error, TensorOverwritten):
            raise error
        own = self._own_calls(args, kwargs)
        table = section_table(self.pairs, lesson.calls, own)
        said = f" ({error})" if error is not None else ""
        raise ShapeMismatch(
            f"The sections do not fit together{said}:\n{table}\nChoose places where both networks have the same shape, "
            f"or use adapters='conv1x1' or 'select' where only the widths differ."
        ) from error

    # -- one section -------------------------------------------------------------------------------------------------

    def _fed(self, i: int, call: Call) -> SectionOutcome:
        if not (self.early and torch.is_grad_enabled()):
            return self._outcome(i, *self._run(i, call))
        parameters = [*self.pairs[i].student.parameters()]
        if self.adapters is not None:
            parameters += self.adapters[i].parameters()
        outcome: list[SectionOutcome] = []

        def loss() -> Tensor:
            outcome.append(self._outcome(i, *self._run(i, call)))
            return outcome[0].loss

        early = early_loss(loss, parameters)
        return replace(outcome.pop(), loss=early)

    def _run(self, i: int, call: Call) -> tuple[Tensor, Tensor]:
        args, kwargs = call.args, call.kwargs
        if i in self._clone_inputs or self.clone is True:
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        if self.adapters is not None:
            args, kwargs = _with_first((args, kwargs), self.adapters[i].input)
        output = self.pairs[i].student(*args, **kwargs)
        if call.is_overwritten() and self.is_inspected:
            raise TensorOverwritten(_OVERWRITTEN.format(name=self.pairs[i].student.path, kind="student"))
        return self._adapted(i, Call(args, kwargs, None, output).tensor, call.tensor)

    def _adapted(self, i: int, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return (output, target) if self.adapters is None else self.adapters[i].pair(output, target)

    def _outcome(self, i: int, output: Tensor, target: Tensor) -> SectionOutcome:
        loss = section_loss(output, target, self.loss, name=self.pairs[i].name)
        with torch.no_grad():
            return SectionOutcome(loss, *mean_squares(output, target))

    def _submodules(self, first: int, last: int | None = None) -> list[nn.Module]:
        return [m for pair in self.pairs[first:last] for m in pair.student.submodules()]


def fit_adapters(
    kind: Literal["conv1x1", "select"],
    teacher: nn.Module,
    student: nn.Module,
    pairs: Sequence[Pair],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    fed: bool,
) -> nn.ModuleList:
    """Return one adapter for each section, made for the shapes that both networks have on an example.

    Args:
        kind: see `Adapter`.
        teacher: the deep network.
        student: the shallow one.
        pairs: the sections.
        args: what the networks are given.
        kwargs: what they are given by name.
        fed: whether the student's sections get the teacher's inputs, which then are mapped too.
    """
    left = observed(teacher, SectionTap([p.teacher for p in pairs], "teacher"), args, kwargs)
    right = observed(student, SectionTap([p.student for p in pairs], "student"), args, kwargs)
    return nn.ModuleList(
        Adapter(kind, match.inputs if fed else None, match.outputs) for match in section_table(pairs, left, right)
    )


def _same(a: Call, b: Call) -> bool:
    left, right = list(tensors_in((a.args, a.kwargs))), list(tensors_in((b.args, b.kwargs)))
    return len(left) == len(right) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(left, right, strict=True)
    )


def _with_first(arguments: Any, function: nn.Module) -> Any:
    """Return the arguments with the first tensor in them mapped."""
    done = False

    def once(x: Tensor) -> Tensor:
        nonlocal done
        if done:
            return x
        done = True
        return function(x)

    return tree_map_only(Tensor, once, arguments)
