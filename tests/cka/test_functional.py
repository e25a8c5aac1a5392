"""Similarity indices against their definitions in NumPy, published values, and what must hold for any features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_methods import cka as package
from lightning_methods.cka import (
    cca,
    cka,
    functional,
    hsic,
    kernel_target_alignment,
    linear_regression_r2,
    matrix,
    procrustes,
    pwcca,
    similarity_matrix,
    svcca,
)
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch
from tests.cka import oracle

KERNELS = [{"kernel": k, "debiased": d} for k in ("linear", "rbf") for d in (False, True)]
SCALARS: list[tuple[str, dict[str, Any]]] = [
    *(("cka", k) for k in KERNELS),
    *(("hsic", k) for k in KERNELS),
    ("cca", {}),
    ("cca", {"statistic": "r2"}),
    ("cca", {"center": False}),
    ("svcca", {"threshold": 0.8}),
    ("svcca", {"statistic": "r2"}),
    ("pwcca", {}),
    ("linear_regression_r2", {}),
    ("procrustes", {}),
    ("procrustes", {"kind": "distance"}),
    ("procrustes", {"kind": "angular"}),
]
BOUNDED = [s for s in SCALARS if s[0] != "hsic" and s[1].get("kind", "similarity") == "similarity"]
quiet = pytest.mark.filterwarnings("ignore::lightning_methods.errors.LightningMethodsWarning")
many = settings(max_examples=12, deadline=None, derandomize=True)


def named(case: Any) -> str:
    return " ".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def index_of(name: str) -> tuple[str, Callable[..., Tensor]]:
    return name.removesuffix("_r2"), getattr(package, name)


def tensor(array: Any) -> Tensor:
    return torch.as_tensor(np.asarray(array), dtype=torch.float64)


def made(n: int, *widths: int, seed: int = 0, common: int = 2) -> list[Tensor]:
    """Return features that have something in common, and means that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, common, generator=generator, dtype=torch.float64)
    found = []
    for width in widths:
        mixed = source @ torch.randn(common, width, generator=generator, dtype=torch.float64)
        found.append(mixed + torch.randn(n, width, generator=generator, dtype=torch.float64) + 1.5)
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- published and independent values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", oracle.NOTEBOOK, ids=named)
def test_notebook(case: Any) -> None:
    x, y = map(tensor, oracle.notebook())
    assert float(getattr(package, case[0])(x, y, **case[1])) == pytest.approx(case[2], abs=1e-10)


@pytest.mark.parametrize("case", oracle.TRIGONOMETRIC, ids=named)
def test_trigonometric(case: Any) -> None:
    a, b = map(tensor, oracle.trigonometric())
    assert float(getattr(package, case[0])(a, b, **case[1])) == pytest.approx(case[2], abs=1e-10)


def test_asymmetric_indices_reversed() -> None:
    for (x, y), cases in (
        (oracle.notebook(), oracle.NOTEBOOK_REVERSED),
        (oracle.trigonometric(), oracle.TRIGONOMETRIC_REVERSED),
    ):
        for name, _, value in cases:
            assert float(getattr(package, name)(tensor(y), tensor(x))) == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("case", oracle.NOTEBOOK, ids=named)
def test_the_oracle_itself(case: Any) -> None:
    assert getattr(oracle, case[0])(*oracle.notebook(), **case[1]) == pytest.approx(case[2], abs=1e-10)


@quiet
@pytest.mark.parametrize("shape", [(20, 4, 6), (13, 1, 9), (12, 3, 25), (9, 30, 40), (140, 3, 5)], ids=str)
@pytest.mark.parametrize("case", SCALARS, ids=named)
def test_definitions(case: Any, shape: tuple[int, int, int]) -> None:
    x, y = made(*shape)
    want = getattr(oracle, case[0])(x.numpy(), y.numpy(), **case[1])
    assert float(getattr(package, case[0])(x, y, **case[1])) == pytest.approx(want, abs=1e-10, rel=1e-10)


@pytest.mark.parametrize("settings", KERNELS, ids=str)
def test_alignment_with_labels(settings: Any) -> None:
    (x,) = made(40, 6)
    labels = torch.arange(40) % 3 * 7 - 1
    want = oracle.kernel_target_alignment(
        x.numpy(), labels.numpy(), debiased=settings["debiased"], **{"kernel": settings["kernel"]}
    )
    assert float(kernel_target_alignment(x, labels, **settings)) == pytest.approx(want, abs=1e-10)
    onehot = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1])
    if settings["kernel"] == "linear":
        assert float(cka(x, onehot, **settings)) == pytest.approx(want, abs=1e-10)


@many
@given(n=st.integers(4, 60), p=st.integers(1, 12), q=st.integers(1, 12), seed=st.integers(0, 999))
def test_form_of_song_is_u_centring(n: int, p: int, q: int, seed: int) -> None:
    x, y = made(n, p, q, seed=seed)
    want = oracle.u_centred_hsic(x.numpy(), y.numpy())
    assert oracle.hsic(x.numpy(), y.numpy(), debiased=True) == pytest.approx(want, abs=1e-9)
    assert float(hsic(x, y, debiased=True)) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_feature_space_is_sample_space(dtype: torch.dtype, debiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (z.to(dtype) for z in made(150, 6, 9))
    scalar, all_pairs = cka(x, y, debiased=debiased), similarity_matrix([x, y], [y], debiased=debiased)
    monkeypatch.setattr(functional, "FEW_SAMPLES", 10**9)
    monkeypatch.setattr(matrix, "_features_are_less_work", lambda a, b: False)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert functional._operands(x, y, ("linear", "linear"), debiased, 0.5)[2] is functional._entries
    assert float(cka(x, y, debiased=debiased)) == pytest.approx(float(scalar), abs=tolerance)
    torch.testing.assert_close(
        similarity_matrix([x, y], [y], debiased=debiased), all_pairs, atol=tolerance, rtol=0, check_dtype=False
    )


# -- what must hold for any features -----------------------------------------------------------------------------------

shapes = st.tuples(st.integers(20, 50), st.integers(2, 6), st.integers(2, 6), st.integers(0, 999))


@quiet
@pytest.mark.parametrize("case", BOUNDED, ids=named)
@many
@given(shape=shapes)
def test_same_representation_and_bounds(case: Any, shape: tuple[int, int, int, int]) -> None:
    n, p, q, seed = shape
    x, y = made(n, p, q, seed=seed)
    compare = getattr(package, case[0])
    assert float(compare(x, x, **case[1])) == pytest.approx(1, abs=1e-10)
    assert (-1 if case[1].get("debiased") else 0) <= float(compare(x, y, **case[1])) <= 1 + 1e-12


@pytest.mark.parametrize("case", [c for c in SCALARS if c[0] not in ("pwcca", "linear_regression_r2")], ids=named)
@many
@given(shape=shapes)
def test_symmetry(case: Any, shape: tuple[int, int, int, int]) -> None:
    n, p, q, seed = shape
    x, y = made(n, p, q, seed=seed)
    compare = getattr(package, case[0])
    assert float(compare(x, y, **case[1])) == pytest.approx(float(compare(y, x, **case[1])), abs=1e-10)


@pytest.mark.parametrize("case", [c for c in BOUNDED if c[0] != "pwcca" and c[1].get("center", True)], ids=named)
@many
@given(shape=shapes, scale=st.floats(1e-6, 1e6))
def test_invariances(case: Any, shape: tuple[int, int, int, int], scale: float) -> None:
    n, p, q, seed = shape
    x, y = made(n, p, q, seed=seed)
    compare = getattr(package, case[0])
    value = float(compare(x, y, **case[1]))
    rotation = torch.linalg.qr(made(p, p, seed=seed)[0])[0]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for changed, other in ((x @ rotation, y), (scale * x, y), (x + 7, y), (x, scale * y), (x[order], y[order])):
        assert float(compare(changed, other, **case[1])) == pytest.approx(value, abs=1e-8)


@many
@given(shape=shapes)
def test_only_cca_and_regression_ignore_a_linear_map(shape: tuple[int, int, int, int]) -> None:
    n, p, q, seed = shape
    x, y = made(n, p, q, seed=seed)
    mapped = y * torch.logspace(-1, 1, q, dtype=y.dtype)
    assert float(cca(x, mapped)) == pytest.approx(float(cca(x, y)), abs=1e-8)
    assert float(linear_regression_r2(x, mapped)) == pytest.approx(float(linear_regression_r2(x, y)), abs=1e-8)
    assert abs(float(cka(y, mapped)) - 1) > 1e-3
    assert abs(float(procrustes(y, mapped)) - 1) > 1e-3


def test_debiased_value_of_independent_features_is_0_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 32, 8, generator=generator, dtype=torch.float64) for _ in range(200)]
    assert abs(np.mean([float(cka(*d, debiased=True)) for d in draws])) < 0.02
    assert 0.15 < np.mean([float(cka(*d)) for d in draws]) < 0.25


# -- gradients ---------------------------------------------------------------------------------------------------------


# those that are trivially 1 for wide features have no gradient there
WIDE = [c for c in SCALARS if c[0] in ("cka", "hsic", "procrustes") or "threshold" in c[1]]
IN_FEATURES = [c for c in SCALARS if c[0] in ("cka", "hsic") and c[1]["kernel"] == "linear"]


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        *(pytest.param(c, (9, 4, 3), id=f"tall {named(c)}") for c in SCALARS),
        *(pytest.param(c, (9, 14, 12), id=f"wide {named(c)}") for c in WIDE),
        *(pytest.param(c, (130, 2, 1), id=f"many {named(c)}") for c in IN_FEATURES),
    ],
)
def test_gradients(case: Any, shape: tuple[int, int, int]) -> None:
    x, y = (z.requires_grad_() for z in made(*shape, seed=3))
    fast = shape[0] > 100
    assert torch.autograd.gradcheck(lambda a, b: getattr(package, case[0])(a, b, **case[1]), (x, y), fast_mode=fast)


def test_gradient_for_labels_and_of_the_same_twice() -> None:
    (x,) = made(10, 4)
    labels = torch.arange(10) % 3
    assert torch.autograd.gradcheck(lambda z: kernel_target_alignment(z, labels), (x.requires_grad_(),))
    (gradient,) = torch.autograd.grad(cka(x, x.detach()), x)
    assert gradient.abs().max() < 1e-12


def test_gradient_of_bases_with_repeated_and_missing_directions() -> None:
    x = torch.linalg.qr(made(12, 3)[0])[0]
    x = torch.cat([x, x[:, :1], torch.zeros(12, 2, dtype=x.dtype)], 1).requires_grad_()
    (y,) = made(12, 2, seed=5)
    for compare in (cca, svcca, linear_regression_r2, lambda p, q: linear_regression_r2(q, p), procrustes, cka):
        (gradient,) = torch.autograd.grad(compare(x, y), x)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-4


def test_gradient_where_nothing_varies_is_0() -> None:
    x = torch.ones(8, 3, dtype=torch.float64, requires_grad=True)
    (y,) = made(8, 2)
    (gradient,) = torch.autograd.grad(cka(x, y, zero_division=0.0), x)
    assert gradient.abs().max() == 0


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 200], ids=["in feature space", "in sample space"])
@pytest.mark.parametrize("settings", KERNELS[:2], ids=str)
def test_float32_with_large_means(settings: Any, width: int) -> None:
    x, y = (z.float() + 100 for z in made(2000, width, width, common=8))
    exact = cka(x.double(), y.double(), **settings)
    assert float(cka(x, y, **settings)) == pytest.approx(float(exact), abs=1e-6)
    assert float(similarity_matrix([x], [y], **settings)) == pytest.approx(float(exact), abs=1e-6)
    assert cka(x, y, **settings).dtype == torch.float32


def test_float32_with_an_outlier_first() -> None:
    x, y = (z.float() for z in made(60, 5, 3))
    x[0] = 1e4
    exact = cka(x.double(), y.double(), debiased=True)
    assert float(cka(x, y, debiased=True)) == pytest.approx(float(exact), abs=1e-5)
    assert float(similarity_matrix([x], [y], debiased=True)) == pytest.approx(float(exact), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("settings", KERNELS, ids=str)
def test_scale_neither_overflows_nor_vanishes(settings: Any, scale: float) -> None:
    x, y = (z.float() for z in made(40, 5, 3))
    value = float(cka(x, y, **settings))
    assert float(cka(scale * x, y, **settings)) == pytest.approx(value, abs=1e-5)
    assert float(similarity_matrix([scale * x, x], [y], **settings)[0]) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BOUNDED, ids=named)
def test_half_precision_is_computed_in_float32(case: Any, dtype: torch.dtype) -> None:
    x, y = (z.to(dtype) for z in made(40, 5, 3))
    got = getattr(package, case[0])(x, y, **case[1])
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(getattr(package, case[0])(x.float(), y.float(), **case[1])), abs=1e-6)


def test_autocast_changes_nothing() -> None:
    x, y = (z.float() for z in made(40, 5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        inside = cka(x, y), similarity_matrix([x], [y])
    assert torch.equal(inside[0], cka(x, y))
    assert torch.equal(inside[1], similarity_matrix([x], [y]))


def test_other_types_and_shapes() -> None:
    x, y = made(20, 12, 3)
    assert float(cka(x.reshape(20, 3, 2, 2), y)) == float(cka(x, y))
    counts = (x * 10).long()
    assert float(cka(counts, y)) == pytest.approx(float(cka(counts.double(), y)), abs=1e-12)
    assert cka(counts > 3, counts).dtype == torch.float32
    assert cka(x.float(), y).dtype == torch.float64


# -- the median distance -----------------------------------------------------------------------------------------------


def distances(x: Tensor) -> Any:
    return ((x[:, None] - x[None]) ** 2).sum(2).numpy()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 9, 511, 512, 513, 700, 1025])
@pytest.mark.parametrize("kind", ["all different", "ties", "ordered"])
def test_median_is_that_of_all_entries(n: int, kind: str) -> None:
    (x,) = made(n, 2)
    if kind == "ties":
        x = x.round()
    elif kind == "ordered":  # by distance from the start, which no stride through the samples would survive
        x = torch.linspace(0, 1, n, dtype=torch.float64)[:, None] ** 3
    assert float(functional.median_distance(x)) == pytest.approx(float(np.median(distances(x))), rel=1e-12, abs=1e-15)


def test_median_does_not_depend_on_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    (x,) = made(600, 2)
    want = float(functional.median_distance(x))
    for bracket in ((0.0, 0.1), (1e3, 1e4), (want * 1.001, want * 1.002)):
        monkeypatch.setattr(functional, "_bracket", lambda x, share, bracket=bracket: bracket)
        assert float(functional.median_distance(x)) == want


def test_median_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    functional.median_distance(made(600, 2)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_more_than_half_duplicates_have_no_bandwidth() -> None:
    x, y = made(12, 3, 2)
    x[:9] = x[0]
    assert math.isnan(cka(x, y, kernel="rbf"))
    assert float(cka(x, y, kernel="rbf", zero_division=0.0)) == 0
    with pytest.warns(LightningMethodsWarning, match=r"features_a\[0\]"):
        assert math.isnan(similarity_matrix([x], [y], kernel="rbf"))


# -- all pairs ---------------------------------------------------------------------------------------------------------

MATRICES = [(name, s) for name, s in SCALARS if s.get("kind") != "distance"]


@quiet
@pytest.mark.parametrize("elements", [None, 2**13], ids=["at once", "in blocks"])
@pytest.mark.parametrize("n", [30, 150])
@pytest.mark.parametrize("case", MATRICES, ids=named)
def test_matrix_is_the_scalars(case: Any, n: int, elements: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if elements:
        monkeypatch.setattr(matrix, "_CPU_ELEMENTS", elements)
        monkeypatch.setattr(functional, "_CPU_ELEMENTS", elements)
    layers = made(n, 3, 7, 1, 45)
    other = made(n, 2, 5, seed=1)
    index, compare = index_of(case[0])
    for b in (other, None):
        got = similarity_matrix(layers, b, index=index, **case[1])
        want = torch.stack([torch.stack([compare(x, y, **case[1]) for y in b or layers]) for x in layers])
        assert (got.dtype, got.requires_grad) == (torch.float64, False)
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("index", ["cka", "hsic", "cca", "svcca", "procrustes"])
def test_self_comparison_is_symmetric(index: str) -> None:
    got = similarity_matrix(made(40, 3, 7, 5), index=index)
    torch.testing.assert_close(got, got.T, atol=1e-12, rtol=1e-12)


def test_matrix_of_names_lists_and_precisions() -> None:
    x, y = made(20, 3, 4)
    plain = similarity_matrix([x, y])
    assert torch.equal(plain, similarity_matrix({"one": x, "two": y}))
    assert torch.equal(plain, similarity_matrix((x.requires_grad_(), y)))
    kept = x.detach().clone()
    mixed = similarity_matrix([x.float(), y])
    torch.testing.assert_close(mixed, plain, atol=1e-6, rtol=0)
    assert torch.equal(x.detach(), kept)


@pytest.mark.parametrize("settings", [*KERNELS, {"index": "cca"}, {"index": "linear_regression"}], ids=str)
def test_dead_layer_keeps_to_itself(settings: Any) -> None:
    x, y, z = made(30, 3, 4, 2)
    dead = torch.full((30, 5), 0.1, dtype=torch.float64)
    with pytest.warns(LightningMethodsWarning) as caught:
        got = similarity_matrix({"first": x, "gone": dead, "last": y}, {"other": z}, **settings)
    (message,) = [str(w.message) for w in caught]
    assert "features_a['gone']" in message
    assert message.count("features_") == 1
    assert caught[0].filename == __file__
    want = similarity_matrix([x, y], [z], **settings)
    assert math.isnan(got[1, 0])
    torch.testing.assert_close(got[[0, 2]], want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_value_chosen_for_dead_layers(dtype: torch.dtype) -> None:
    x, y = (z.to(dtype) for z in made(30, 3, 4))
    rounded = torch.full_like(x, 0.1) * (1 + torch.finfo(dtype).eps * torch.rand(30, 3).round())
    assert math.isnan(cka(rounded, y))
    assert float(cka(rounded, y, zero_division=0.5)) == 0.5
    with pytest.warns(LightningMethodsWarning, match=r"features_a\[0\], features_b\[1\]"):
        got = similarity_matrix([rounded, x], [y, rounded], zero_division=0.0)
    assert got[0].tolist() == [0, 0]
    assert float(got[1, 1]) == 0
    assert float(hsic(rounded, y)) == 0
    assert math.isnan(procrustes(rounded, y))
    assert math.isnan(pwcca(rounded, y))
    assert float(linear_regression_r2(x, rounded)) == 0


@pytest.mark.parametrize("n", [20, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_in_which_one_sample_is_active_has_no_debiased_value(dtype: torch.dtype, n: int) -> None:
    x, y = (z.to(dtype) for z in made(n, 1, 2))
    active = torch.zeros(n, 2, dtype=dtype)
    active[3] = torch.tensor([2.0, 0.7], dtype=dtype)
    assert math.isfinite(cka(active, y))
    assert math.isnan(cka(active, y, debiased=True))
    with pytest.warns(LightningMethodsWarning, match=r"features_a\[0\]"):
        got = similarity_matrix([active, x], [y], debiased=True)
    assert math.isnan(got[0])
    assert math.isfinite(got[1])


@quiet
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [30, 150])
@pytest.mark.parametrize("case", MATRICES, ids=named)
def test_nan_keeps_to_its_layer(case: Any, n: int, bad: float) -> None:
    index, compare = index_of(case[0])
    x, y, z = made(n, 3, 4, 2)
    broken = y.clone()
    broken[2, 1] = bad
    got = similarity_matrix([x, broken, z], index=index, **case[1])
    want = similarity_matrix([x, z], index=index, **case[1])
    assert got[1].isnan().all()
    assert got[:, 1].isnan().all()
    torch.testing.assert_close(got[[0, 2]][:, [0, 2]], want, atol=1e-12, rtol=0)
    assert math.isnan(compare(x, broken, **case[1]))


def test_nan_is_not_what_is_chosen_for_dead_layers() -> None:
    x, y = made(30, 3, 4)
    x[0, 0] = math.nan
    assert math.isnan(cka(x, y, zero_division=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(similarity_matrix([x], [y], zero_division=0.0))


# -- warnings and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cca", "svcca", "pwcca", "linear_regression_r2"])
def test_more_features_than_samples_are_said_to_be_trivial(name: str) -> None:
    index, compare = index_of(name)
    x, y = made(12, 3, 40)
    kwargs = {"threshold": 1.0} if name == "svcca" else {}
    with pytest.warns(LightningMethodsWarning, match="rank is as large as the number of samples") as caught:
        assert float(compare(x, y, **kwargs)) == pytest.approx(1)
    assert caught[0].filename == __file__
    with pytest.warns(LightningMethodsWarning, match=r"features_b\['wide'\]") as caught:
        got = similarity_matrix({"narrow": x, "again": x}, {"wide": y}, index=index, **kwargs)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "narrow" not in str(caught[0].message)
    assert got.tolist() == [[pytest.approx(1)]] * 2


def test_no_warning_where_there_is_no_reason() -> None:
    x, y = made(40, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, kwargs in SCALARS:
            getattr(package, name)(x, y, **kwargs)
            similarity_matrix([x, y], index=index_of(name)[0], **kwargs)
        linear_regression_r2(made(12, 40)[0], made(12, 3)[0])


@pytest.mark.parametrize("case", SCALARS, ids=named)
def test_samples_must_fit(case: Any) -> None:
    index, compare = index_of(case[0])
    x, y = made(10, 3, 4)
    with pytest.raises(ShapeMismatch, match="x has 10 samples and y 9"):
        compare(x, y[:9], **case[1])
    with pytest.raises(ShapeMismatch, match=r"features_a\['a'\] has 10 samples and features_b\['b'\] 9"):
        similarity_matrix({"a": x}, {"b": y[:9]}, index=index, **case[1])
    least = 4 if case[1].get("debiased") else 2
    with pytest.raises(ShapeMismatch, match=f"needs at least {least}"):
        compare(x[: least - 1], y[: least - 1], **case[1])
    with pytest.raises(ShapeMismatch, match=f"There are {least - 1} samples"):
        similarity_matrix([x[: least - 1]], index=index, **case[1])


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: cka(x, x, kernel="poly"), InvalidArgument, "kernel='poly' is not known"),
        (lambda x: cka(x, x, kernel="rbf", bandwidth=0.0), InvalidArgument, "bandwidth=0.0: a positive fraction"),
        (lambda x: cka(x, x, bandwidth=math.nan), InvalidArgument, "bandwidth=nan"),
        (lambda x: cka(x + 0j, x), InvalidArgument, "complex numbers"),
        (lambda x: cka(x, x.numpy()), InvalidArgument, "y is a ndarray"),
        (lambda x: cka(x[:, 0], x), ShapeMismatch, r"x has the shape \(10,\).*x\[:, None\]"),
        (lambda x: cca(x, x, statistic="r"), InvalidArgument, "statistic='r' is not known"),
        (lambda x: svcca(x, x, threshold=1.2), InvalidArgument, "threshold=1.2: a share"),
        (lambda x: svcca(x, x, threshold=0.0), InvalidArgument, "threshold=0.0: a share"),
        (lambda x: procrustes(x, x, kind="angle"), InvalidArgument, "Did you mean 'angular'"),
        (lambda x: kernel_target_alignment(x, x), ShapeMismatch, "one integer class per sample"),
        (lambda x: kernel_target_alignment(x, [0] * 10), InvalidArgument, "labels is a list"),
        (lambda x: kernel_target_alignment(x, torch.ones(10)), ShapeMismatch, "torch.float32"),
        (lambda x: kernel_target_alignment(x, torch.arange(9)), ShapeMismatch, "10 samples"),
        (lambda x: similarity_matrix([x], index="ckaa"), InvalidArgument, "index='ckaa' is not known"),
        (lambda x: similarity_matrix([x], biased=True), InvalidArgument, "'biased' is not known.*'debiased'"),
        (lambda x: similarity_matrix([x], index="cca", kernel="rbf"), InvalidArgument, "index 'cca'='kernel'"),
        (lambda x: similarity_matrix([x], index="cca", statistic="r"), InvalidArgument, "statistic='r'"),
        (lambda x: similarity_matrix([x], index="svcca", threshold=2), InvalidArgument, "threshold=2"),
        (lambda x: similarity_matrix([x], index="procrustes", kind="d"), InvalidArgument, "kind='d'"),
        (lambda x: similarity_matrix([x], kernel="rbf", bandwidth=-1), InvalidArgument, "bandwidth=-1"),
        (lambda x: similarity_matrix([]), InvalidArgument, "features_a is empty"),
        (lambda x: similarity_matrix([x], {}), InvalidArgument, "features_b is empty"),
        (lambda x: similarity_matrix(x), InvalidArgument, "features_a is a Tensor; a list or dict"),
        (lambda x: similarity_matrix([x, x + 1j]), InvalidArgument, r"features_a\[1\] holds complex"),
        (lambda x: similarity_matrix([x, "x"]), InvalidArgument, r"features_a\[1\] is a str"),
        (lambda x: similarity_matrix([x, x.to("meta")]), InvalidArgument, "cpu and meta; move them"),
    ],
)
def test_refusals(call: Callable[[Tensor], Any], error: type[Exception], said: str) -> None:
    (x,) = made(10, 3)
    with pytest.raises(error, match=said):
        call(x)


def test_few_samples() -> None:
    x, y = made(2, 3, 4)
    assert float(cka(x, y)) == pytest.approx(1)
    assert math.isfinite(cka(x, y, kernel="rbf"))
    x, y = made(4, 3, 4)
    assert float(cka(x, y, debiased=True)) == pytest.approx(oracle.cka(x.numpy(), y.numpy(), debiased=True), abs=1e-10)


def test_features_of_no_width_do_not_vary() -> None:
    x, y = made(10, 3, 4)
    assert math.isnan(cka(x[:, :0], y))
    with pytest.warns(LightningMethodsWarning, match=r"features_a\[1\]"):
        assert similarity_matrix([x, x[:, :0]]).isnan().tolist() == [[False, True], [True, True]]
