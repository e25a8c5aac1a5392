"""The soft nearest neighbour loss against loops in NumPy, its published values, and what must hold for any features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.snnl import (
    chance_level,
    class_entanglement,
    median_temperature,
    optimal_temperature,
    paper_temperature_step,
    soft_nearest_neighbor_loss,
)
from lightning_methods.snnl.functional import _plain_losses, anchor_losses, class_labels
from tests.snnl import oracle

DISTANCES = ("sqeuclidean", "cosine")
TEMPERATURES = (0.01, 0.1, 1.0, 10.0, 100.0, 1e6)
both_distances = pytest.mark.parametrize("distance", DISTANCES)


def tensor(array: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(np.asarray(array)).to(dtype)


def labels_of(array: Any) -> Tensor:
    return torch.as_tensor(np.asarray(array)).long()


def made(samples: int = 24, features: int = 6, classes: int = 4, seed: int = 0, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return features and labels; the first classes are the most frequent, the last may be a single sample."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (samples,), generator=generator)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64) + 0.5 * y[:, None]
    return x.to(kwargs.get("dtype", torch.float64)), y


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- published and independent values ----------------------------------------------------------------------------------

# in float64 by loops over the equation, for T = 0.01, 0.1, 1, 10, 100, 1e6
CARD = {
    "A, three classes": (
        oracle.A,
        oracle.Y3,
        "sqeuclidean",
        [
            107.0890106795106,
            10.668224288227334,
            1.2323284955325529,
            1.2513915070230905,
            1.295338769708818,
            1.2992825999529127,
        ],
    ),
    "A, a class of one": (
        oracle.A,
        oracle.YS,
        "sqeuclidean",
        [
            322.38953474765003,
            32.27266065520914,
            3.4940578906109745,
            1.505007955194553,
            1.4183370439569338,
            1.409865213523971,
        ],
    ),
    "A, three classes, cosine": (
        oracle.A,
        oracle.Y3,
        "cosine",
        [
            23.53808795803728,
            2.4162175840420628,
            1.2054438514462358,
            1.2916008616257528,
            1.2985351909378713,
            1.299282909574949,
        ],
    ),
}
CARD_CASES = [
    pytest.param(x, y, kind, t, value, id=f"{name}, T={t:g}")
    for name, (x, y, kind, values) in CARD.items()
    for t, value in zip(TEMPERATURES, values, strict=True)
]


@pytest.mark.parametrize(("x", "y", "kind", "t", "expected"), CARD_CASES)
def test_values_of_the_fixture(x: Any, y: Any, kind: Any, t: float, expected: float) -> None:
    assert float(soft_nearest_neighbor_loss(tensor(x), labels_of(y), t, distance=kind)) == pytest.approx(
        expected, rel=1e-12, abs=1e-12
    )


@pytest.mark.parametrize(
    ("x", "t", "expected"),
    [
        pytest.param(oracle.X1337, 1.0, 3.4394295661680894, id="unrelated, T=1"),
        pytest.param(oracle.X1337, 10.0, 1.6824811630522536, id="unrelated, T=10"),
        pytest.param(oracle.X1337, 100.0, 1.6529051691215257, id="unrelated, T=100"),
        pytest.param(oracle.X1337_SHIFTED, 1.0, 0.8616449239140045, id="shifted, T=1"),
        pytest.param(oracle.X1337_SHIFTED, 10.0, 0.6498063903322411, id="shifted, T=10"),
        pytest.param(oracle.X1337_SHIFTED, 100.0, 1.3385341398258037, id="shifted, T=100"),
    ],
)
def test_values_of_the_random_fixture(x: Any, t: float, expected: float) -> None:
    value = soft_nearest_neighbor_loss(tensor(x), labels_of(oracle.Y1337), t)
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_value_of_three_points() -> None:
    # by hand: log(1 + e^-8) and log(1 + e^-3), the third point is alone in its class
    value = soft_nearest_neighbor_loss(tensor([[0.0], [1.0], [3.0]]), labels_of([0, 0, 1]), 1.0)
    assert float(value) == pytest.approx(0.024461378973318792, rel=1e-13)
    assert float(value) == pytest.approx((math.log1p(math.exp(-8)) + math.log1p(math.exp(-3))) / 2, rel=1e-13)


@pytest.mark.parametrize("t", TEMPERATURES)
@both_distances
@pytest.mark.parametrize("name", ["B", "duplicates", "zero vectors", "ignored"])
def test_equals_the_loops(name: str, distance: Any, t: float) -> None:
    x, y, ignore = oracle.B.copy(), oracle.Y3.copy(), None
    if name == "duplicates":
        x = np.repeat(oracle.A[:6], 2, axis=0)
    elif name == "zero vectors":
        x[[0, 5, 7]] = 0
    elif name == "ignored":
        ignore = -100
        y[[1, 4, 5]] = ignore
    value = soft_nearest_neighbor_loss(tensor(x), labels_of(y), t, distance=distance, ignore_index=ignore)
    assert float(value) == pytest.approx(oracle.loss(x, y, t, distance, ignore), rel=1e-11, abs=1e-12)


@both_distances
@pytest.mark.parametrize("y", [oracle.Y3, oracle.YS], ids=["three classes", "a class of one"])
def test_reductions_agree_with_the_loops(y: Any, distance: Any) -> None:
    expected = np.array(oracle.losses(oracle.A, y, 2.0, distance))
    found = {
        r: soft_nearest_neighbor_loss(tensor(oracle.A), labels_of(y), 2.0, distance=distance, reduction=r)
        for r in ("none", "sum", "mean")
    }
    assert found["none"].numpy() == pytest.approx(np.nan_to_num(expected), rel=1e-12, abs=1e-14)
    assert float(found["sum"]) == pytest.approx(np.nansum(expected), rel=1e-12)
    assert float(found["mean"]) == pytest.approx(np.nanmean(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        pytest.param(oracle.Y3, 1.2992829841302609, id="three classes"),
        pytest.param(oracle.YS, 1.4098643772506696, id="a class of one"),
        pytest.param([5] * 4, 0.0, id="one class"),
        pytest.param([1, 2, 3], 0.0, id="all alone"),
        pytest.param([], 0.0, id="empty"),
    ],
)
def test_chance_level(y: Any, expected: float) -> None:
    level = chance_level(labels_of(y))
    assert level.dtype == torch.float64
    assert float(level) == pytest.approx(expected, rel=1e-14)
    assert float(level) == pytest.approx(oracle.chance(np.asarray(y)), rel=1e-14)


def test_chance_level_leaves_out_ignored_samples() -> None:
    y = labels_of([0, -1, 0, 1, -1, 1, 1])
    assert float(chance_level(y, ignore_index=-1)) == pytest.approx(oracle.chance(y[y != -1].numpy()), rel=1e-14)


@pytest.mark.parametrize(
    ("x", "y", "temperature", "loss"),
    [
        pytest.param(oracle.A, oracle.Y3, 1.7895622, 1.0550717768145, id="A"),
        pytest.param(oracle.X1337_SHIFTED, oracle.Y1337, 3.33316820, 0.4790956994659019, id="shifted"),
    ],
)
def test_optimal_temperature_of_the_fixtures(x: Any, y: Any, temperature: float, loss: float) -> None:
    found = optimal_temperature(tensor(x), labels_of(y))
    assert float(found[0]) == pytest.approx(temperature, rel=1e-6)
    assert float(found[1]) == pytest.approx(loss, rel=1e-12)


@both_distances
def test_optimal_temperature_equals_a_golden_section_search(distance: Any) -> None:
    def by_log(u: float) -> float:
        return oracle.loss(oracle.A, oracle.Y3, math.exp(u), distance)

    u, loss = oracle.minimum(by_log, math.log(0.05), math.log(20))
    found = optimal_temperature(tensor(oracle.A), labels_of(oracle.Y3), distance=distance)
    assert float(found[0]) == pytest.approx(math.exp(u), rel=1e-6)
    assert float(found[1]) == pytest.approx(loss, rel=1e-12)


def test_optimal_temperature_is_infinite_where_nothing_beats_chance() -> None:
    temperature, loss = optimal_temperature(tensor(oracle.A), labels_of(oracle.YS))
    assert math.isinf(temperature)
    assert float(loss) == pytest.approx(1.4098643772506696, rel=1e-14)


def test_optimal_temperature_leaves_out_ignored_samples() -> None:
    x, y = made(30)
    y[::4] = -1
    kept = y != -1
    x[0] = math.nan
    assert optimal_temperature(x, y, ignore_index=-1) == optimal_temperature(x[kept], y[kept])


@pytest.mark.parametrize(
    ("x", "y", "t", "loss"),
    [
        pytest.param(oracle.A, oracle.Y3, 1.00040462, 1.29533713, id="A"),
        pytest.param(oracle.X1337_SHIFTED, oracle.Y1337, 1.0238336405, 1.3328870072, id="shifted"),
    ],
)
def test_paper_step_of_the_fixtures(x: Any, y: Any, t: float, loss: float) -> None:
    found = paper_temperature_step(tensor(x), labels_of(y), 1.0)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(t, rel=1e-8)
    assert float(soft_nearest_neighbor_loss(tensor(x), labels_of(y), 100.0 / found)) == pytest.approx(loss, rel=1e-8)


@both_distances
@pytest.mark.parametrize("t", [0.3, 1.0, 40.0])
def test_paper_step_equals_a_difference_quotient(t: float, distance: Any) -> None:
    expected = oracle.paper_t(lambda temperature: oracle.loss(oracle.B, oracle.Y3, temperature, distance), t)
    found = paper_temperature_step(tensor(oracle.B), labels_of(oracle.Y3), t, distance=distance)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [30.0, 100.0])
@pytest.mark.parametrize("steps", [1, 30])
def test_paper_step_stays_positive_on_large_features(scale: float, steps: int) -> None:
    # the released code arrives at t = -1.8 and -30 here, and its loss at 90 and 16,647
    generator = torch.Generator().manual_seed(0)
    x, y = scale * torch.randn(100, 10, generator=generator), torch.arange(100) % 5
    t = torch.ones((), dtype=torch.float64)
    unclamped = oracle_step(x, y)
    for _ in range(steps):
        t = paper_temperature_step(x, y, t)
        assert 1e-6 <= float(t) <= 1e6
    assert unclamped < 0
    assert float(soft_nearest_neighbor_loss(x, y, 100.0 / t)) < 2 * float(chance_level(y))


def oracle_step(x: Tensor, y: Tensor) -> float:
    """Return t after the released code's first step, by plain autograd."""
    t = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(plain_loss(x.double(), y, 100.0 / t), t)
    return float(1 - 0.1 * slope)


def test_paper_step_keeps_t_where_features_are_not_finite() -> None:
    x, y = made()
    x[3, 2] = math.inf
    assert float(paper_temperature_step(x, y, 0.7)) == pytest.approx(0.7, rel=1e-15)


@pytest.mark.parametrize(
    ("x", "distance", "expected"),
    [
        pytest.param([[0.0], [1.0], [3.0]], "sqeuclidean", 4.0, id="three points"),
        pytest.param([[0.0], [0.0], [0.0], [2.0]], "sqeuclidean", 4.0, id="duplicates do not count"),
        pytest.param([[1.0]] * 3, "sqeuclidean", 1.0, id="all the same"),
        pytest.param([[1.0, 2.0]], "sqeuclidean", 1.0, id="one sample"),
        pytest.param(np.zeros((0, 3)), "sqeuclidean", 1.0, id="no sample"),
        pytest.param([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]], "cosine", 1.0, id="cosine"),
        pytest.param([[0.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], "cosine", 1.0, id="cosine, zero vector"),
    ],
)
def test_median_temperature(x: Any, distance: Any, expected: float) -> None:
    assert float(median_temperature(tensor(x), distance=distance)) == pytest.approx(expected, rel=1e-12)


def test_median_temperature_of_many_samples_uses_some_of_them() -> None:
    x, _ = made(3000)
    assert float(median_temperature(x)) == float(median_temperature(x[::6]))
    assert float(median_temperature(x)) == pytest.approx(float(median_temperature(x[::7])), rel=0.1)


def test_cosine_median_has_no_residue_of_the_diagonal() -> None:
    # 1 - cos of a sample with itself is 1e-8, not 0, which once halved the median of few samples
    x = torch.tensor([[1.0, 0.3, 0.2], [0.3, 1.0, 0.1], [0.2, 0.9, 0.4]])
    pairs = [
        oracle.distance(x[i].double().numpy(), x[j].double().numpy(), "cosine") for i in range(3) for j in range(i)
    ]
    assert float(median_temperature(x, distance="cosine")) == pytest.approx(sorted(pairs)[1], rel=1e-5)


# -- properties of the function ----------------------------------------------------------------------------------------


@st.composite
def samples(draw: st.DrawFn, least: int = 2) -> tuple[Tensor, Tensor]:
    """Draw features of any scale with labels; classes of one sample and duplicates included."""
    count, width = draw(st.integers(least, 16)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        x[draw(st.integers(0, count - 1))] = x[draw(st.integers(0, count - 1))]
    y = torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count)))
    return x * 10 ** draw(st.floats(-2, 2)), y


temperatures = st.floats(-1.5, 3).map(lambda power: 10**power)
any_distance = st.sampled_from(DISTANCES)
a_property = settings(max_examples=40, deadline=None)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance))


@a_property
@given(data=samples(), t=temperatures, distance=any_distance)
def test_equals_the_loops_for_any_features(data: Any, t: float, distance: Any) -> None:
    x, y = data
    value = soft_nearest_neighbor_loss(x, y, t, distance=distance)
    scale = 1 + float(x.abs().max()) ** 2 / t  # that of the scores, whose rounding remains
    assert abs(float(value) - oracle.loss(x.numpy(), y.numpy(), t, distance)) < 1e-12 * scale


@a_property
@given(data=samples(), t=temperatures, seed=st.integers(0, 999))
def test_does_not_depend_on_translation(data: Any, t: float, seed: int) -> None:
    x, y = data
    shift = x.abs().max() * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    t *= float(median_temperature(x))
    assert close(soft_nearest_neighbor_loss(x + shift, y, t), soft_nearest_neighbor_loss(x, y, t))


def test_does_not_depend_on_a_large_translation_in_float32() -> None:
    # quarters, which float32 holds exactly also at 1,000
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (256, 64), generator=generator).float() / 4
    y = torch.arange(256) % 7
    near, far = (soft_nearest_neighbor_loss(x + offset, y, 30.0) for offset in (0.0, 1e3))
    assert float(far) == pytest.approx(float(near), rel=1e-5)


@a_property
@given(data=samples(), t=temperatures, distance=any_distance, seed=st.integers(0, 999))
def test_does_not_depend_on_rotation(data: Any, t: float, distance: Any, seed: int) -> None:
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64))
    t *= float(median_temperature(x, distance=distance))
    rotated = soft_nearest_neighbor_loss(x @ rotation, y, t, distance=distance)
    assert close(rotated, soft_nearest_neighbor_loss(x, y, t, distance=distance))


@a_property
@given(data=samples(), t=temperatures, distance=any_distance, order=st.randoms(use_true_random=False))
def test_goes_along_with_a_permutation_of_the_samples(data: Any, t: float, distance: Any, order: Any) -> None:
    x, y = data
    shuffled = order.sample(range(len(x)), len(x))
    t *= float(median_temperature(x, distance=distance))
    each = soft_nearest_neighbor_loss(x, y, t, distance=distance, reduction="none")
    permuted = soft_nearest_neighbor_loss(x[shuffled], y[shuffled], t, distance=distance, reduction="none")
    assert close(permuted, each[shuffled])


@a_property
@given(data=samples(), t=temperatures, names=st.permutations(range(7)))
def test_does_not_depend_on_the_names_of_the_classes(data: Any, t: float, names: list[int]) -> None:
    x, y = data
    renamed = torch.tensor(names)[y + 3] * 1000 - 2500
    assert torch.equal(soft_nearest_neighbor_loss(x, renamed, t), soft_nearest_neighbor_loss(x, y, t))


@a_property
@given(data=samples(), t=temperatures, c=st.floats(-3, 3).map(lambda power: 10**power))
def test_only_the_ratio_of_distance_and_temperature_matters(data: Any, t: float, c: float) -> None:
    x, y = data
    t *= float(median_temperature(x))
    assert close(soft_nearest_neighbor_loss(c * x, y, c * c * t), soft_nearest_neighbor_loss(x, y, t))


@a_property
@given(data=samples(), t=temperatures, distance=any_distance)
def test_is_never_negative(data: Any, t: float, distance: Any) -> None:
    x, y = data
    t *= float(median_temperature(x, distance=distance))
    assert float(soft_nearest_neighbor_loss(x, y, t, distance=distance, reduction="none").min()) >= -1e-12


@a_property
@given(data=samples(), distance=any_distance)
def test_optimum_is_below_chance_and_below_every_temperature(data: Any, distance: Any) -> None:
    x, y = data
    chance = float(chance_level(y))
    _, least = optimal_temperature(x, y, distance=distance)
    assert float(least) <= chance + 1e-12
    middle = float(median_temperature(x, distance=distance))
    for power in np.linspace(-2.9, 6, 40):
        value = soft_nearest_neighbor_loss(x, y, middle * 10**power, distance=distance)
        # the search is a grid refined in its best place, so that another valley may win by a hair
        assert float(least) <= float(value) + 1e-3 * max(chance, 1e-9)


@a_property
@given(data=samples(), distance=any_distance, c=st.floats(-3, 3).map(lambda power: 10**power))
def test_optimum_does_not_depend_on_scale(data: Any, distance: Any, c: float) -> None:
    x, y = data
    (_, least), (_, scaled) = (optimal_temperature(z, y, distance=distance) for z in (x, c * x))
    assert close(scaled, least, 1e-7)


@a_property
@given(data=samples(), distance=any_distance)
def test_infinite_temperature_is_chance(data: Any, distance: Any) -> None:
    x, y = data
    far = 1e9 * float(median_temperature(x, distance=distance))
    assert close(soft_nearest_neighbor_loss(x, y, math.inf, distance=distance), chance_level(y), 1e-13)
    assert close(soft_nearest_neighbor_loss(x, y, far, distance=distance), chance_level(y), 1e-7)


def test_low_temperature_tells_whether_every_nearest_neighbour_is_of_the_class() -> None:
    x = tensor([[0.0], [1.0], [5.0], [6.5]])
    apart, mixed = labels_of([0, 0, 1, 1]), labels_of([0, 1, 0, 1])
    values = [float(soft_nearest_neighbor_loss(x, apart, t)) for t in (10.0, 1.0, 0.1, 1e-2)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    # otherwise T times the loss goes to the mean of d2(nearest of the class) - d2(nearest)
    expected = np.mean([25 - 1, 30.25 - 1, 25 - 2.25, 30.25 - 2.25])
    assert 1e-5 * float(soft_nearest_neighbor_loss(x, mixed, 1e-5)) == pytest.approx(expected, rel=1e-6)


@given(data=samples(), t=temperatures, distance=any_distance)
@a_property
def test_one_class_has_loss_zero(data: Any, t: float, distance: Any) -> None:
    x, _ = data
    x.requires_grad_()
    loss = soft_nearest_neighbor_loss(x, torch.full((len(x),), 4), t, distance=distance)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(x.grad.abs().max()) == 0.0


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("count", "y"),
    [
        pytest.param(0, [], id="no sample"),
        pytest.param(1, [3], id="one sample"),
        pytest.param(2, [0, 1], id="two classes of one"),
        pytest.param(5, [0, 1, 2, 3, 4], id="all alone"),
        pytest.param(4, [-1, -1, -1, 2], id="all ignored but one"),
        pytest.param(3, [-1, -1, -1], id="all ignored"),
    ],
)
@both_distances
def test_nothing_to_compare_gives_zero_with_zero_gradient(
    count: int, y: list[int], distance: Any, reduction: Any, chunk_size: int | None
) -> None:
    x = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"distance": distance, "ignore_index": -1, "chunk_size": chunk_size}
    loss = soft_nearest_neighbor_loss(x, labels_of(y), t, reduction=reduction, **options)
    assert loss.shape == ((count,) if reduction == "none" else ())
    assert float(loss.detach().sum()) == 0.0
    loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert float(t.grad) == 0.0
    assert [float(v) for v in optimal_temperature(x, labels_of(y), distance=distance, ignore_index=-1)] == [math.inf, 0]
    assert float(paper_temperature_step(x, labels_of(y), 1.5, distance=distance, ignore_index=-1)) == 1.5


def test_two_samples_of_one_class_have_loss_zero() -> None:
    assert float(soft_nearest_neighbor_loss(tensor([[0.0], [9.0]]), labels_of([1, 1]), 1.0)) == 0.0


# -- gradients ---------------------------------------------------------------------------------------------------------


def plain_loss(
    x: Tensor, y: Tensor, t: float | Tensor, distance: str = "sqeuclidean", ignore: int | None = None
) -> Tensor:
    """Return the mean loss from the pair distances by plain autograd, sharing nothing with the closed form."""
    keep = torch.ones_like(y, dtype=torch.bool) if ignore is None else y != ignore
    x, y = x[keep], y[keep]
    if distance == "cosine":
        unit = x / x.norm(dim=1, keepdim=True)
        pairs = 1 - unit @ unit.T
    else:
        pairs = (x[:, None] - x[None]).square().sum(2)
    others = ~torch.eye(len(x), dtype=torch.bool)
    positive = (y[:, None] == y) & others
    valid = positive.any(1)
    scores = (-pairs / t)[valid]
    everything = scores.masked_fill(~others[valid], -math.inf).logsumexp(1)
    own = scores.masked_fill(~positive[valid], -math.inf).logsumexp(1)
    return (everything - own).mean()


GRADIENT_CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"chunk_size": 3}, id="chunked"),
    pytest.param({"ignore_index": 2}, id="ignoring"),
    pytest.param({"ignore_index": 2, "chunk_size": 4}, id="ignoring, chunked"),
]


@pytest.mark.parametrize("options", GRADIENT_CASES)
@both_distances
@pytest.mark.parametrize("order", ["first", "second"])
def test_derivatives_by_features_and_temperature(order: str, distance: Any, options: dict[str, Any]) -> None:
    x, y = made(9, 3, 3)
    inputs = (x.requires_grad_(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True))
    weights = torch.linspace(0.5, 2, len(x), dtype=torch.float64)  # an upstream gradient that differs between anchors

    def function(features: Tensor, temperature: Tensor) -> Tensor:
        each = soft_nearest_neighbor_loss(features, y, temperature, distance=distance, reduction="none", **options)
        return (each * weights).sum()

    check = torch.autograd.gradcheck if order == "first" else torch.autograd.gradgradcheck
    assert check(function, inputs)


@both_distances
def test_second_derivative_where_the_temperature_comes_from_the_features(distance: Any) -> None:
    x, y = made(8, 3, 2)

    def function(features: Tensor) -> Tensor:
        return soft_nearest_neighbor_loss(features, y, features.square().mean(), distance=distance)

    assert torch.autograd.gradgradcheck(function, (x.requires_grad_(),))


def test_zero_vector_has_finite_derivatives_of_both_orders_with_cosine() -> None:
    x, y = made(8, 3, 2)
    x[2] = 0
    x.requires_grad_()
    (first,) = torch.autograd.grad(soft_nearest_neighbor_loss(x, y, 0.5, distance="cosine"), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.equal(first[2], torch.zeros(3, dtype=torch.float64))
    assert bool(second.isfinite().all())
    assert float(second.abs().max()) > 0


@pytest.mark.parametrize("options", GRADIENT_CASES)
@both_distances
@pytest.mark.parametrize("t", [0.2, 3.0, 200.0])
def test_closed_form_equals_plain_autograd(t: float, distance: Any, options: dict[str, Any]) -> None:
    x, y = made(40, 7, 5)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = soft_nearest_neighbor_loss(ours, y, a, distance=distance, **options)
    reference = plain_loss(theirs, y, b, distance, options.get("ignore_index"))
    assert float(value) == pytest.approx(float(reference), rel=1e-11)
    value.backward()
    reference.backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13)
    assert float(a.grad) == pytest.approx(float(b.grad), rel=1e-9)


@both_distances
def test_differentiable_form_equals_the_closed_one(distance: Any) -> None:
    x, y = made(20)
    keep = y != 1
    cosine = distance == "cosine"
    unit = torch.nn.functional.normalize(x) if cosine else x
    closed, valid = anchor_losses(x, y, 2.0, distance=distance, keep=keep, rows=slice(4, 15))
    plain = _plain_losses(unit, torch.tensor(0.5, dtype=torch.float64), y, keep, (4, 15), cosine)
    assert torch.allclose(plain, closed, rtol=1e-11, atol=1e-13)
    assert bool((plain[~valid] == 0).all())


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_graph_can_be_kept_and_gone_through_twice(chunk_size: int | None) -> None:
    x, y = made()
    x.requires_grad_()
    loss = soft_nearest_neighbor_loss(x, y, 4.0, chunk_size=chunk_size)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("chunk_size", [None, 100])
@pytest.mark.parametrize("t", [64.0, 512.0])
def test_float32_gradient_is_as_exact_as_float32_can_be(t: float, chunk_size: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(1024, 512, generator=generator), torch.randint(10, (1024,), generator=generator)
    gradients = []
    for z in (x.clone(), x.double()):
        z.requires_grad_()
        soft_nearest_neighbor_loss(z, y, t, chunk_size=chunk_size).backward()
        gradients.append(z.grad.double())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) <= 2e-6


def test_infinite_temperature_has_no_gradient() -> None:
    x, y = made()
    t = torch.tensor(math.inf, dtype=torch.float64, requires_grad=True)
    soft_nearest_neighbor_loss(x.requires_grad_(), y, t).backward()
    assert float(t.grad) == 0.0
    assert float(x.grad.abs().max()) == 0.0


def test_learned_log_temperature_gets_its_gradient() -> None:
    x, y = made()
    log_beta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    soft_nearest_neighbor_loss(x, y, (-log_beta).exp()).backward()
    h = 1e-5
    values = [float(soft_nearest_neighbor_loss(x, y, math.exp(-u))) for u in (h, -h)]
    assert float(log_beta.grad) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


# -- chunks, slices and memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 23, 24, 25, 1000])
@pytest.mark.parametrize("ignore_index", [None, 0])
@both_distances
def test_chunks_change_nothing(distance: Any, ignore_index: int | None, chunk_size: int) -> None:
    x, y = made(24)
    results = []
    for size in (None, chunk_size):
        z, t = x.clone().requires_grad_(), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        loss = soft_nearest_neighbor_loss(z, y, t, distance=distance, ignore_index=ignore_index, chunk_size=size)
        loss.backward()
        results.append((loss.detach(), z.grad, t.grad))
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(chunked, whole, rtol=1e-11, atol=1e-15)
    steps = [paper_temperature_step(x, y, 1.0, ignore_index=ignore_index, chunk_size=c) for c in (None, chunk_size)]
    assert float(steps[1]) == pytest.approx(float(steps[0]), rel=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("ignore_index", [None, 1])
@pytest.mark.parametrize("cuts", [(0, 24), (0, 11, 24), (0, 0, 5, 5, 23, 24)], ids=["one", "two", "some empty"])
@both_distances
def test_slices_of_anchors_add_up_to_the_whole(
    distance: Any, cuts: tuple[int, ...], ignore_index: int | None, chunk_size: int | None
) -> None:
    x, y = made(24)
    keep = None if ignore_index is None else y != ignore_index
    whole = x.clone().requires_grad_()
    soft_nearest_neighbor_loss(whole, y, 3.0, distance=distance, reduction="sum", ignore_index=ignore_index).backward()
    parts = x.clone().requires_grad_()
    pieces = []
    for a, b in pairwise(cuts):
        losses, valid = anchor_losses(
            parts, y, 3.0, distance=distance, keep=keep, rows=slice(a, b), chunk_size=chunk_size
        )
        assert losses.shape == valid.shape == (b - a,)
        losses.sum().backward()
        pieces.append(losses.detach())
    each = soft_nearest_neighbor_loss(x, y, 3.0, distance=distance, reduction="none", ignore_index=ignore_index)
    assert torch.allclose(torch.cat(pieces), each, rtol=1e-11, atol=1e-14)
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-10, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("learned", [False, True], ids=["fixed T", "learned T"])
def test_chunks_never_make_a_matrix_of_all_pairs(learned: bool) -> None:
    x, y = made(600, 4, 5, dtype=torch.float32)
    x.requires_grad_()
    t = torch.tensor(2.0, requires_grad=True) if learned else 2.0
    with LargestTensor() as largest:
        soft_nearest_neighbor_loss(x, y, t, chunk_size=10).backward()
    assert largest.elements == 10 * 600
    with LargestTensor() as largest:
        soft_nearest_neighbor_loss(x, y, t).backward()
    assert largest.elements == 600 * 600


@pytest.mark.slow
def test_batch_whose_pairs_would_not_fit_into_memory_runs_in_chunks() -> None:
    # one matrix of all pairs would be 6.4 GB
    x, y = made(40_000, 2, 5, dtype=torch.float32)
    value = soft_nearest_neighbor_loss(x, y, 1.0, chunk_size=64)
    part = soft_nearest_neighbor_loss(x[::12], y[::12], 1.0)
    assert float(value) == pytest.approx(float(part), rel=0.05)


# -- numerics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "bfloat16 autocast"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@both_distances
def test_no_temperature_and_no_scale_gives_nan(distance: Any, scale: float, kind: str) -> None:
    x, y = made(32, 16, 4, dtype=torch.float32)
    x = x / x.abs().max() * scale
    if kind in ("float16", "bfloat16"):
        x = x.to(getattr(torch, kind))
    context = torch.autocast("cpu", torch.bfloat16) if "autocast" in kind else nullcontext()
    for power in range(-4, 7):
        z = x.clone().requires_grad_()
        with context:
            loss = soft_nearest_neighbor_loss(z, y, 10.0**power, distance=distance)
        loss.backward()
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())
        assert not bool(z.grad.isnan().any())
        assert bool(z.grad.isfinite().all()) or kind == "float16"  # in which gradients above 65,504 are infinite
        expected = float(soft_nearest_neighbor_loss(x.double(), y, 10.0**power, distance=distance))
        assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@both_distances
def test_autocast_changes_nothing(distance: Any) -> None:
    x, y = made(32, 16, 4, dtype=torch.float32)
    results = []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        z = x.clone().requires_grad_()
        with context:
            loss = soft_nearest_neighbor_loss(z, y, 5.0, distance=distance)
            best = optimal_temperature(x, y, distance=distance)
            pairs = class_entanglement(x, y, 5.0, distance=distance)
            step = paper_temperature_step(x, y, 1.0, distance=distance)
            median = median_temperature(x, distance=distance)
            loss.backward()
        results.append((loss.detach(), z.grad, *best, pairs, step, median))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@both_distances
def test_what_is_not_finite_shows_in_the_value(distance: Any, bad: float) -> None:
    x, y = made()
    x[5, 1] = bad
    z = x.clone().requires_grad_()
    loss = soft_nearest_neighbor_loss(z, y, 2.0, distance=distance)
    loss.backward()
    assert math.isnan(loss)
    assert bool(z.grad.isnan().any())
    assert math.isnan(optimal_temperature(x, y, distance=distance)[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300], ids=["nan", "inf", "huge"])
@pytest.mark.parametrize("chunk_size", [None, 5])
@both_distances
def test_what_is_ignored_shows_nowhere(distance: Any, chunk_size: int | None, bad: float) -> None:
    x, y = made()
    y[[2, 7]] = -1
    kept = y != -1
    dirty = x.clone()
    dirty[2] = bad
    options: dict[str, Any] = {"distance": distance, "ignore_index": -1}
    z, clean = dirty.clone().requires_grad_(), x[kept].clone().requires_grad_()
    loss = soft_nearest_neighbor_loss(z, y, 2.0, chunk_size=chunk_size, **options)
    reference = soft_nearest_neighbor_loss(clean, y[kept], 2.0, distance=distance)
    loss.backward()
    reference.backward()
    assert float(loss) == pytest.approx(float(reference), rel=1e-11)
    assert torch.allclose(z.grad[kept], clean.grad, rtol=1e-9, atol=1e-13)
    assert float(z.grad[~kept].abs().max()) == 0.0
    losses, _ = anchor_losses(dirty, y, 2.0, distance=distance, keep=kept)
    assert bool(losses.isfinite().all())
    t = [float(paper_temperature_step(a, b, 1.0, **options)) for a, b in ((dirty, y), (x[kept], y[kept]))]
    assert t[0] == pytest.approx(t[1], rel=1e-12)


def test_ignored_rows_far_away_cost_no_precision() -> None:
    # the centre is that of the rows that count
    x, y = made(64, 8, 3, dtype=torch.float32)
    x = (x * 4).round() / 4
    y[::4] = -1
    near = soft_nearest_neighbor_loss(x, y, 10.0, ignore_index=-1)
    moved = torch.where((y == -1)[:, None], -1e6, x + 1e3)
    assert float(soft_nearest_neighbor_loss(moved, y, 10.0, ignore_index=-1)) == pytest.approx(float(near), rel=1e-5)


def test_compiled_equals_eager() -> None:
    x, y = made(16, 4, 3, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: soft_nearest_neighbor_loss(a * 2, b, 3.0), backend="aot_eager")
    eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, value = soft_nearest_neighbor_loss(eager * 2, y, 3.0), compiled(traced, y)
    expected.backward()
    value.backward()
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(traced.grad, eager.grad, rtol=1e-5, atol=1e-8)


def test_random_state_and_inputs_stay_as_they_were() -> None:
    x, y = made()
    kept, state = x.clone(), torch.get_rng_state()
    for distance in DISTANCES:
        soft_nearest_neighbor_loss(x, y, 1.0, distance=distance)  # type: ignore[arg-type]
        optimal_temperature(x, y, distance=distance)  # type: ignore[arg-type]
        class_entanglement(x, y, 1.0, distance=distance)  # type: ignore[arg-type]
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)


# -- labels and arguments ----------------------------------------------------------------------------------------------

ONE_HOT = torch.nn.functional.one_hot(labels_of(oracle.Y3), 4)


@pytest.mark.parametrize(
    "y",
    [
        pytest.param(labels_of(oracle.Y3)[:, None], id="(B, 1)"),
        pytest.param(labels_of(oracle.Y3).int(), id="int32"),
        pytest.param(labels_of(oracle.Y3).to(torch.uint8), id="uint8"),
        pytest.param(labels_of(oracle.Y3).float(), id="whole floats"),
        pytest.param(labels_of(oracle.Y3).float()[:, None], id="whole floats (B, 1)"),
        pytest.param(ONE_HOT, id="one-hot"),
        pytest.param(ONE_HOT.float(), id="one-hot floats"),
        pytest.param(ONE_HOT.bool(), id="one-hot booleans"),
        pytest.param(2**24 + labels_of(oracle.Y3), id="above 2^24"),
        pytest.param(2**62 + labels_of(oracle.Y3), id="near 2^62"),
        pytest.param(-(2**40) - labels_of(oracle.Y3), id="far below 0"),
    ],
)
def test_forms_of_labels(y: Tensor) -> None:
    x = tensor(oracle.A)
    assert class_labels(y).shape == (12,)
    assert torch.equal(soft_nearest_neighbor_loss(x, y, 1.0), soft_nearest_neighbor_loss(x, labels_of(oracle.Y3), 1.0))
    assert float(chance_level(y)) == pytest.approx(1.2992829841302609, rel=1e-14)
    assert float(optimal_temperature(x, y)[1]) == pytest.approx(1.0550717768145, rel=1e-12)


def test_two_booleans_are_two_classes() -> None:
    y = torch.tensor([True, False, True, False])
    assert float(chance_level(y)) == pytest.approx(math.log(3), rel=1e-14)


@pytest.mark.parametrize(
    ("y", "error", "said"),
    [
        pytest.param(torch.full((12, 3), 1 / 3), InvalidArgument, ("soft", "one class per sample", "mixup"), id="soft"),
        pytest.param(torch.ones(12, 3), InvalidArgument, ("several labels", "one class per sample"), id="multi-label"),
        pytest.param(torch.zeros(12, 3), InvalidArgument, ("one class per sample",), id="no label"),
        pytest.param(torch.full((12,), 0.5), InvalidArgument, ("fractions", "regression"), id="fractions"),
        pytest.param(torch.full((12,), math.nan), InvalidArgument, ("not finite", "one class"), id="nan"),
        pytest.param(torch.full((12,), math.inf), InvalidArgument, ("not finite", "one class"), id="inf"),
        pytest.param(torch.ones(12, dtype=torch.complex64), InvalidArgument, ("complex", "one class"), id="complex"),
        pytest.param([0] * 12, InvalidArgument, ("list", "tensor"), id="list"),
        pytest.param(torch.zeros(11).long(), ShapeMismatch, ("12 rows", "11 labels", "one label per row"), id="short"),
        pytest.param(torch.zeros(12, 2, 2).long(), ShapeMismatch, ("(12, 2, 2)", "(B,)", "one-hot"), id="3-D"),
        pytest.param(torch.tensor(1), ShapeMismatch, ("()", "(B,)"), id="0-D"),
        pytest.param(torch.zeros(12, 0), ShapeMismatch, ("(12, 0)", "(B,)"), id="no column"),
    ],
)
def test_labels_that_are_refused(y: Any, error: type[Exception], said: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        soft_nearest_neighbor_loss(tensor(oracle.A), y, 1.0)
    assert all(words in str(caught.value) for words in said)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        pytest.param(torch.ones(12), ("(12,)", "(B, D)"), id="1-D"),
        pytest.param(torch.tensor(1.0), ("()", "(B, D)"), id="0-D"),
        pytest.param(torch.ones(12, 2, dtype=torch.complex64), ("complex64", "real numbers"), id="complex"),
    ],
)
def test_features_that_are_refused(x: Tensor, said: tuple[str, ...]) -> None:
    with pytest.raises(ShapeMismatch) as caught:
        soft_nearest_neighbor_loss(x, labels_of(oracle.Y3), 1.0)
    assert all(words in str(caught.value) for words in said)


def test_features_are_flattened_and_whole_numbers_read() -> None:
    x = torch.arange(48).reshape(12, 2, 2)
    flat = soft_nearest_neighbor_loss(x.reshape(12, 4).float(), labels_of(oracle.Y3), 50.0)
    assert torch.equal(soft_nearest_neighbor_loss(x, labels_of(oracle.Y3), 50.0), flat)


Call = Callable[[Any], Any]
WITH_TEMPERATURE: dict[str, Call] = {
    "loss": lambda t: soft_nearest_neighbor_loss(tensor(oracle.A), labels_of(oracle.Y3), t),
    "class_entanglement": lambda t: class_entanglement(tensor(oracle.A), labels_of(oracle.Y3), t),
    "paper step": lambda t: paper_temperature_step(tensor(oracle.A), labels_of(oracle.Y3), t),
}


@pytest.mark.parametrize("call", WITH_TEMPERATURE.values(), ids=WITH_TEMPERATURE)
@pytest.mark.parametrize(
    ("t", "error"),
    [
        pytest.param(0.0, InvalidArgument, id="0"),
        pytest.param(-1.0, InvalidArgument, id="negative"),
        pytest.param(math.nan, InvalidArgument, id="nan"),
        pytest.param(-math.inf, InvalidArgument, id="-inf"),
        pytest.param("median", InvalidArgument, id="a mode"),
        pytest.param(torch.tensor(-1.0), InvalidArgument, id="negative tensor"),
        pytest.param(torch.tensor(-1.0, requires_grad=True), InvalidArgument, id="negative parameter"),
        pytest.param(torch.ones(2), ShapeMismatch, id="two numbers"),
    ],
)
def test_temperatures_that_are_refused(t: Any, error: type[Exception], call: Call) -> None:
    with pytest.raises(error, match="number is needed"):
        call(t)


@pytest.mark.parametrize(
    "t", [2, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2), torch.tensor(2.0, dtype=torch.float16)]
)
def test_temperatures_that_are_read(t: Any) -> None:
    for call in WITH_TEMPERATURE.values():
        assert torch.equal(call(t), call(2.0))


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda x, y: soft_nearest_neighbor_loss(x, y, distance="cosin"), id="distance"),
        pytest.param(lambda x, y: soft_nearest_neighbor_loss(x, y, reduction="average"), id="reduction"),
        pytest.param(lambda x, y: optimal_temperature(x, y, distance="l2"), id="optimal, distance"),
        pytest.param(lambda x, y: median_temperature(x, distance="l2"), id="median, distance"),
        pytest.param(lambda x, y: class_entanglement(x, y, 1.0, distance="l2"), id="pairs, distance"),
    ],
)
def test_unknown_modes_are_refused_with_those_that_are_known(call: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"is not known\. (Did you mean|There are)"):
        call(tensor(oracle.A), labels_of(oracle.Y3))


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_chunk_size_must_be_positive(chunk_size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"chunk_size={chunk_size}.*at least 1"):
        soft_nearest_neighbor_loss(tensor(oracle.A), labels_of(oracle.Y3), chunk_size=chunk_size)


# -- class entanglement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.5, 4.0, 1e6])
@both_distances
def test_class_entanglement_equals_the_loops(distance: Any, t: float) -> None:
    found = class_entanglement(tensor(oracle.A), labels_of(oracle.YS), t, distance=distance)
    assert found.shape == (8, 8)
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(
        oracle.entanglement(oracle.A, oracle.YS, t, 8, distance), rel=1e-11, abs=1e-15
    )


@a_property
@given(data=samples(), t=temperatures, distance=any_distance)
def test_class_entanglement_gives_shares(data: Any, t: float, distance: Any) -> None:
    x, y = data
    t *= float(median_temperature(x, distance=distance))
    pairs = class_entanglement(x, y + 3, t, distance=distance, num_classes=9)
    present = torch.bincount(y + 3, minlength=9) > 0
    assert bool((pairs >= 0).all())
    assert torch.allclose(pairs.sum(1), present.double(), rtol=0, atol=1e-12)
    assert float(pairs[:, ~present].abs().max()) == 0.0


def test_class_entanglement_at_infinite_temperature_counts_the_others() -> None:
    pairs = class_entanglement(tensor(oracle.A), labels_of(oracle.YS), math.inf)
    assert pairs[0, :3].tolist() == pytest.approx([2 / 11, 4 / 11, 4 / 11])


def test_class_entanglement_leaves_out_ignored_samples() -> None:
    x, y = made()
    y[::3] = -100
    x[0] = math.nan
    kept = y != -100
    found = class_entanglement(x, y, 2.0, ignore_index=-100, num_classes=4)
    assert torch.equal(found, class_entanglement(x[kept], y[kept], 2.0, num_classes=4))


@pytest.mark.parametrize(("count", "shape"), [(0, (0, 0)), (1, (3, 3))])
def test_class_entanglement_of_too_few_samples_is_zero(count: int, shape: tuple[int, int]) -> None:
    found = class_entanglement(torch.ones(count, 2), torch.full((count,), 2), 1.0)
    assert torch.equal(found, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("y", "num_classes"),
    [pytest.param([0, -1, 1, 1], None, id="negative"), pytest.param([0, 3, 1, 1], 3, id="above num_classes")],
)
def test_class_entanglement_refuses_labels_outside(y: list[int], num_classes: int | None) -> None:
    with pytest.raises(InvalidArgument, match=r"The labels go from .* is needed.*ignore_index"):
        class_entanglement(torch.ones(4, 2), labels_of(y), 1.0, num_classes=num_classes)


@pytest.mark.parametrize("n", [40, 1100], ids=["every row", "a part of the rows"])
def test_at_the_median_temperature_the_loss_has_no_gradient_along_the_scale(n: int) -> None:
    """Else a negative weight would shrink the features in place of entangling them."""
    torch.manual_seed(0)
    x = torch.randn(n, 6, dtype=torch.float64).add_((torch.arange(n) % 4)[:, None]).requires_grad_()
    y = torch.arange(n) % 4
    (gradient,) = torch.autograd.grad(soft_nearest_neighbor_loss(x, y, median_temperature(x)), x)
    centred = (x - x.mean(0)).detach()
    assert abs(float((gradient * centred).sum())) <= 1e-12 * float(gradient.norm() * centred.norm())
    (radial,) = torch.autograd.grad(soft_nearest_neighbor_loss(x, y, median_temperature(x.detach())), x)
    assert abs(float((radial * centred).sum())) > 1e-3 * float(radial.norm() * centred.norm())


def test_the_median_temperature_is_a_number_where_no_gradient_is_wanted() -> None:
    x = torch.randn(20, 3, requires_grad=True)
    with torch.no_grad():
        assert not median_temperature(x).requires_grad
    assert not median_temperature(x, distance="cosine").requires_grad
    assert torch.equal(median_temperature(x).detach(), median_temperature(x.detach()))
    same = torch.ones(5, 2, requires_grad=True)
    soft_nearest_neighbor_loss(same, torch.arange(5) % 2, median_temperature(same)).backward()
    assert torch.equal(same.grad, torch.zeros(5, 2))


@pytest.mark.parametrize("scale", [1e25, math.inf, math.nan], ids=str)
def test_the_median_temperature_of_features_that_overflow_is_still_a_number(scale: float) -> None:
    x = (torch.randn(20, 3) * scale).requires_grad_()
    temperature = median_temperature(x)
    assert float(temperature.detach()) > 0
    loss = soft_nearest_neighbor_loss(x, torch.arange(20) % 4, temperature)  # which raised
    assert not loss.detach().isfinite()
