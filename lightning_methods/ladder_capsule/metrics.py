"""Metrics of what a change of pose does: to the accuracy, to the representation, to the code vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_methods.errors import InvalidArgument, ShapeMismatch, check_choice


class _InFloat64(Metric):
    """A metric whose states stay in float64 when the module it belongs to is cast: `.to(torch.bfloat16)` only moves."""

    def set_dtype(self, dst_type: str | torch.dtype) -> _InFloat64:
        """Change nothing."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        this = super()._apply(fn, exclude_state=(*exclude_state, *self._defaults))
        defaults: dict[str, Any] = self._defaults
        for name, default in defaults.items():
            state = getattr(self, name)
            moved = [x.to(self.device) for x in state] if isinstance(state, list) else state.to(self.device)
            setattr(self, name, moved)
            defaults[name] = default if isinstance(default, list) else default.to(self.device)
        return this


class PoseGeneralizationCurve(_InFloat64):
    r"""Accuracy at each level of a pose (an angle, a shift), and the area under this curve.

    .. math:: \mathrm{AUC} = \frac{1}{\theta_L - \theta_1} \int_{\theta_1}^{\theta_L} \mathrm{acc}(\theta)\, d\theta

    by the trapezoidal rule: the mean accuracy over the range, from 0 to 1.

    Shapes:
        `update` takes for each sample the predicted and the true class and its level, `(B,)` each (the level may be one
        number for all), or whether it was classified correctly and its level. `compute` returns the ascending `levels`
        `(L,)`, `accuracy` `(L,)`, `count` `(L,)` and the scalar `auc`, all in float64.

    Args:
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        InvalidArgument: if `compute` is called before any sample was seen, or a level is not finite.
        ShapeMismatch: if lengths differ.

    Example:
        >>> curve = PoseGeneralizationCurve()
        >>> curve.update(torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0)
        >>> curve.update(torch.tensor([1, 2]), torch.tensor([1, 0]), 45.0)
        >>> found = curve.compute()
        >>> found["accuracy"].tolist(), found["auc"].item()
        ([1.0, 0.5], 0.75)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: list[Tensor]
    level: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", default=[], dist_reduce_fx="cat")
        self.add_state("level", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor | float, level: Tensor | float | None = None) -> None:
        """Add a batch: (classes, true classes, level), or (whether correct, level)."""
        if level is None:
            correct, level = preds, target
            if not bool(((correct == 0) | (correct == 1)).all()):
                raise InvalidArgument("Without classes, whether each sample is correct is needed: 0 or 1.")
        else:
            target = torch.as_tensor(target, device=preds.device)
            if preds.shape != target.shape:
                raise ShapeMismatch(f"preds {tuple(preds.shape)} and target {tuple(target.shape)} differ in length.")
            correct = preds == target
        levels = torch.as_tensor(level, dtype=torch.float64, device=correct.device)
        if levels.ndim and levels.shape != correct.shape:
            raise ShapeMismatch(f"{len(correct)} samples and {len(levels)} levels: one each, or one level, is needed.")
        if not bool(torch.isfinite(levels).all()):
            raise InvalidArgument("A level is not finite.")
        self.correct.append(correct.flatten().double())
        self.level.append(levels.expand(correct.shape).flatten())

    def compute(self) -> dict[str, Tensor]:
        """Return levels, accuracies, counts and the area."""
        if not self.correct:
            raise InvalidArgument("PoseGeneralizationCurve saw no sample; call update first.")
        correct, level = dim_zero_cat(self.correct), dim_zero_cat(self.level)
        if not len(correct):
            raise InvalidArgument("PoseGeneralizationCurve saw empty batches alone.")
        levels, place = level.unique(return_inverse=True)
        count = torch.zeros_like(levels).index_add(0, place, torch.ones_like(correct))
        accuracy = torch.zeros_like(levels).index_add(0, place, correct) / count
        auc = accuracy[0]
        if len(levels) > 1:
            auc = torch.trapezoid(accuracy, levels) / (levels[-1] - levels[0])
        return {"levels": levels, "accuracy": accuracy, "count": count, "auc": auc}


class EquivarianceR2(_InFloat64):
    r"""How well a linear map explains what a change of pose does to a representation.

    A ridge regression :math:`T` from the poses of images to those of the same images, moved, is fitted on every second
    row, and rated on the others:

    .. math:: R^2 = 1 - \frac{\sum \lVert z' - T z \rVert^2}{\sum \lVert z' - \bar z' \rVert^2}

    1 is a linear action on the representation, 0 no better than the mean. Beside it `identity`, the same with
    :math:`T = I` (high where the representation is invariant), and `shuffled`, with :math:`T` fitted to rows of other
    images (what chance gives).

    Shapes:
        `update` takes representations `(B, D)` and those of the moved images `(B, D)`, and classes `(B,)` where each
        class has coordinates of its own: then there is one map a class, and sums are over all of them. `compute`
        returns the scalars `r2`, `identity` and `shuffled` in float64.

    Args:
        ridge: weight of the squared map, as a share of the mean square of the representation.
        seed: of the shuffling.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        InvalidArgument: if `ridge` is not positive, a representation is not finite, or `compute` has not four samples
            (of any class).
        ShapeMismatch: if shapes differ, or only some batches bring classes.

    Example:
        >>> z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> metric = EquivarianceR2()
        >>> metric.update(z, z @ torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
        >>> found = metric.compute()
        >>> bool(found["r2"] > 0.99), bool(found["identity"] < 0.5), bool(found["shuffled"] < 0.5)
        (True, True, True)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    before: list[Tensor]
    after: list[Tensor]
    classes: list[Tensor]

    def __init__(self, ridge: float = 1e-3, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ridge > 0:
            raise InvalidArgument(f"ridge={ridge}: a positive weight is needed.")
        self.ridge, self.seed = ridge, seed
        for name in ("before", "after", "classes"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, representation: Tensor, moved: Tensor, classes: Tensor | None = None) -> None:
        """Add a batch of images and of the same images, moved."""
        if representation.ndim != 2 or representation.shape != moved.shape:
            raise ShapeMismatch(
                f"The representation {tuple(representation.shape)} and that of the moved images {tuple(moved.shape)} "
                "must both be (B, D)."
            )
        if classes is not None and classes.shape != representation.shape[:1]:
            raise ShapeMismatch(f"{len(representation)} samples and classes {tuple(classes.shape)}; (B,) is needed.")
        if not bool(torch.isfinite(representation).all() & torch.isfinite(moved).all()):
            raise InvalidArgument("The representation is not finite.")
        if self.before and (classes is None) != (not self.classes):
            raise ShapeMismatch("Some batches came with classes and some without.")
        self.before.append(representation.detach().double())
        self.after.append(moved.detach().double())
        if classes is not None:
            self.classes.append(classes.detach())

    def compute(self) -> dict[str, Tensor]:
        """Return the coefficients of determination of the fitted, the identical and the shuffled map."""
        if not self.before:
            raise InvalidArgument("EquivarianceR2 saw no sample; call update first.")
        x, y = dim_zero_cat(self.before), dim_zero_cat(self.after)
        groups = dim_zero_cat(self.classes) if self.classes else torch.zeros(len(x), dtype=torch.long)
        generator = torch.Generator().manual_seed(self.seed)
        sums = torch.zeros(4, dtype=torch.float64, device=x.device)
        used = 0
        for group in groups.unique():
            rows = (groups == group).nonzero().flatten().to(x.device)
            if len(rows) >= 4:  # two to fit, two to rate
                sums += self._sums(x[rows], y[rows], generator)
                used += len(rows)
        if not used:
            raise InvalidArgument(f"EquivarianceR2 needs at least four samples of a class, and saw {len(x)} in all.")
        total = sums[3]
        if total == 0:  # nothing moves: explained if the residual is zero as well
            found = (sums[:3] == 0).double()
        else:
            found = 1 - sums[:3] / total
        return dict(zip(("r2", "identity", "shuffled"), found, strict=True))

    def _sums(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return squared residuals of the three maps, and of the mean, on the odd rows."""
        fit_x, fit_y, x, y = x[::2], y[::2], x[1::2], y[1::2]
        shuffled = fit_y[torch.randperm(len(fit_y), generator=generator).to(y.device)]
        given = [self._fitted(fit_x, fit_y, x), x, self._fitted(fit_x, shuffled, x), fit_y.mean(0)]
        return torch.stack([(y - z).square().sum() for z in given])

    def _fitted(self, x: Tensor, y: Tensor, new: Tensor) -> Tensor:
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        gram = x.T @ x
        # of a representation that never changes any multiple of the unit matrix will do
        weight = self.ridge * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny ** 0.5
        solved = torch.linalg.solve(gram + weight * torch.eye(len(gram), dtype=x.dtype, device=x.device), x.T @ y)
        return y_mean + (new - x_mean) @ solved


class CodeOverlap(_InFloat64):
    r"""How many of the kept capsules are kept again when the pose changes.

    .. math:: \mathrm{overlap} = \frac{|S \cap S'|}{|S|}, \qquad \mathrm{jaccard} = \frac{|S \cap S'|}{|S \cup S'|}

    averaged over the images; 1 where the code vector does not change.

    Shapes:
        `update` takes the code vectors `(B, N)` of images and of the same images, moved; `compute` returns a scalar in
        float64.

    Args:
        kind: `"overlap"` or `"jaccard"`.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        InvalidArgument: if a code vector is empty, or `compute` is called before any sample was seen.
        ShapeMismatch: if shapes differ.

    Example:
        >>> metric = CodeOverlap()
        >>> metric.update(torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 1, 1, 0]]))
        >>> metric.compute().item()
        0.5
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, kind: Literal["overlap", "jaccard"] = "overlap", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("kind", kind, ("overlap", "jaccard"))
        self.kind = kind
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, code: Tensor, moved: Tensor) -> None:
        """Add a batch of code vectors and those of the same images, moved."""
        if code.ndim != 2 or code.shape != moved.shape:
            raise ShapeMismatch(f"The codes {tuple(code.shape)} and {tuple(moved.shape)} must both be (B, N).")
        first, second = code.detach() > 0, moved.detach() > 0
        if not bool((first.any(1) & second.any(1)).all()):
            raise InvalidArgument("A code vector is empty: at least one capsule of each image must be kept.")
        both = (first & second).sum(1).double()
        whole = first.sum(1) if self.kind == "overlap" else (first | second).sum(1)
        self.total += (both / whole).sum()
        self.count += len(code)

    def compute(self) -> Tensor:
        """Return the mean over the images."""
        if self.count == 0:
            raise InvalidArgument("CodeOverlap saw no sample; call update first.")
        return self.total / self.count
