"""CKA over batches: averages against NumPy, one pass against all samples at once, and life across processes."""

from __future__ import annotations

import math
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_methods.cka import MinibatchCKA, StreamingCKA, similarity_matrix
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch
from tests.cka import oracle
from tests.support.processes import run_ranks

Batch = tuple[dict[str, Tensor], dict[str, Tensor] | None]
METRICS: dict[str, Callable[[], Any]] = {"minibatch": MinibatchCKA, "streaming": StreamingCKA}
both = pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
quiet = pytest.mark.filterwarnings("ignore::lightning_methods.errors.LightningMethodsWarning")
many = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(n: int = 60, seed: int = 0, offset: float = 2.0) -> Batch:
    """Return the features of two networks of three and two layers, on the same samples."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    sides = []
    for widths in ((4, 1, 7), (5, 3)):
        mixing = [torch.randn(3, w, generator=generator, dtype=torch.float64) for w in widths]
        noise = [torch.randn(n, w, generator=generator, dtype=torch.float64) for w in widths]
        sides.append({f"layer{i}": source @ m + e + offset for i, (m, e) in enumerate(zip(mixing, noise, strict=True))})
    return sides[0], sides[1]


def rows(data: Batch, chosen: Any) -> Batch:
    a, b = data
    return {k: v[chosen] for k, v in a.items()}, None if b is None else {k: v[chosen] for k, v in b.items()}


def split(data: Batch, *sizes: int) -> list[Batch]:
    """Return batches of these sizes, the last size as often as needed."""
    n, start, found = len(data[0]["layer0"]), 0, []
    sizes_left = list(sizes)
    while start < n:
        size = sizes_left.pop(0) if len(sizes_left) > 1 else sizes_left[0]
        found.append(rows(data, slice(start, start + size)))
        start += size
    return found


def updated(metric: Any, batches: list[Batch]) -> Any:
    for batch in batches:
        metric.update(*batch)
    return metric


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


# -- averaged over batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", oracle.NOTEBOOK_MINIBATCH)
def test_minibatch_values(size: int) -> None:
    x, y = (torch.as_tensor(z) for z in oracle.notebook())
    metric = MinibatchCKA()
    for p, q in zip(x.split(size), y.split(size), strict=True):
        metric.update([p], [q])
    assert float(metric.compute()) == pytest.approx(oracle.NOTEBOOK_MINIBATCH[size], abs=1e-10)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("batch_weight", ["n", "uniform"])
def test_a_short_last_batch_weighs_what_is_said(batch_weight: Any, kernel: Any) -> None:
    (a, b), sizes = made(), [25, 25, 10]
    weights = [float(n) if batch_weight == "n" else 1.0 for n in sizes]
    got = updated(MinibatchCKA(batch_weight=batch_weight, kernel=kernel), split((a, b), *sizes)).compute()
    for i, x in enumerate(a.values()):
        for j, y in enumerate((b or {}).values()):
            pairs = [(p.numpy(), q.numpy()) for p, q in zip(x.split(sizes), y.split(sizes), strict=True)]
            assert float(got[i, j]) == pytest.approx(oracle.minibatch_cka(pairs, weights, kernel=kernel), abs=1e-10)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_one_batch_is_the_debiased_value(kernel: Any) -> None:
    data = made()
    got = updated(MinibatchCKA(kernel=kernel, bandwidth=0.4), [data]).compute()
    close(got, similarity_matrix(*data, kernel=kernel, debiased=True, bandwidth=0.4))


def test_minibatches_of_other_scales_are_not_weighed_by_them_twice() -> None:
    # features are scaled before their products, which must not show in the average
    a, b = made(40)
    grown = {k: torch.cat([v[:20], 1e3 * v[20:]]) for k, v in a.items()}
    got = updated(MinibatchCKA(), split((grown, b), 20)).compute()
    x, y = grown["layer0"].numpy(), (b or {})["layer0"].numpy()
    want = oracle.minibatch_cka([(x[:20], y[:20]), (x[20:], y[20:])], [1, 1])
    assert float(got[0, 0]) == pytest.approx(want, abs=1e-10)


def test_widths_may_change_between_minibatches() -> None:
    first, second = torch.randn(2, 20, 6, dtype=torch.float64)
    metric = MinibatchCKA()
    metric.update([first, second])
    metric.update([first[:, :4], second])
    assert metric.compute().isfinite().all()


def test_small_batches_are_skipped_counted_and_said_once() -> None:
    data = made(61)
    batches = split(data, 20, 20, 3, 18)
    metric = MinibatchCKA()
    with pytest.warns(LightningMethodsWarning, match="skips a batch of 3 samples") as caught:
        updated(metric, [*batches, rows(data, slice(1)), rows(data, slice(0))])
    assert len(caught) == 1
    assert int(metric.skipped) == 3
    del batches[2]
    close(metric.compute(), updated(MinibatchCKA(), batches).compute(), 1e-14)


@quiet
def test_only_small_batches() -> None:
    metric = updated(MinibatchCKA(), [rows(made(), slice(3))])
    with pytest.raises(InvalidArgument, match="no batch of at least 4"):
        metric.compute()


# -- exact in one pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("same", [False, True], ids=["two networks", "one"])
@many
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), seed=st.integers(0, 99), offset=st.floats(-50, 50))
def test_streaming_is_all_at_once(same: bool, debiased: bool, sizes: list[int], seed: int, offset: float) -> None:
    a, b = made(seed=seed, offset=offset)
    data = (a, None if same else b)
    got = updated(StreamingCKA(debiased=debiased), split(data, *sizes)).compute()
    close(got, similarity_matrix(*data, debiased=debiased))


@pytest.mark.parametrize("size", range(1, 61, 3))
def test_every_batch_size(size: int) -> None:
    x, y = (torch.as_tensor(z) + 3 for z in oracle.notebook())
    for debiased, want in ((True, 0.5134564895055259), (False, 0.5576132566117585)):
        metric = StreamingCKA(debiased=debiased)
        for p, q in zip(x.split(size), y.split(size), strict=True):
            metric.update([p], [q])
        assert float(metric.compute()) == pytest.approx(want, abs=1e-10)


@many
@given(order=st.permutations(range(6)))
def test_order_of_batches_is_irrelevant(order: list[int]) -> None:
    batches = split(made(), 13, 4, 9, 20, 7)
    for make in METRICS.values():
        got = updated(make(), [batches[i] for i in order if i < len(batches)]).compute()
        close(got, updated(make(), batches).compute(), 1e-12)


def test_shuffled_samples_give_the_same_streaming_value() -> None:
    data = made()
    shuffled = rows(data, torch.randperm(60, generator=torch.Generator().manual_seed(0)))
    close(updated(StreamingCKA(), split(shuffled, 7)).compute(), updated(StreamingCKA(), split(data, 11)).compute())


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_streaming_float32_with_large_means(offset: float) -> None:
    data = made(offset=offset)
    single = {k: v.float() for k, v in data[0].items()}, {k: v.float() for k, v in (data[1] or {}).items()}
    exact = similarity_matrix(*({k: v.double() for k, v in side.items()} for side in single), debiased=True)
    close(updated(StreamingCKA(), split(single, 7)).compute(), exact, 1e-9)


def test_an_unlike_first_sample() -> None:
    a, b = made()
    a["layer0"][0] += 30
    close(updated(StreamingCKA(), split((a, b), 7)).compute(), similarity_matrix(a, b, debiased=True), 1e-9)


def test_streaming_says_when_there_are_too_few_samples() -> None:
    data = made()
    assert updated(StreamingCKA(debiased=False), [rows(data, slice(2))]).compute().isfinite().all()
    with pytest.raises(ShapeMismatch, match="3 samples in all; at least 4"):
        updated(StreamingCKA(), [rows(data, slice(0)), rows(data, slice(1)), rows(data, slice(2))]).compute()
    with pytest.raises(ShapeMismatch, match="0 samples in all"):
        updated(StreamingCKA(), [rows(data, slice(0))]).compute()


def test_layers_that_are_too_wide_are_refused() -> None:
    wide = torch.zeros(4, 9000)
    with pytest.raises(ShapeMismatch, match=r"18,000 features in all.*max_width=16,384.*2\.6 GB.*MinibatchCKA"):
        StreamingCKA().update([wide, wide])
    with pytest.raises(ShapeMismatch, match="7 features in all"):
        StreamingCKA(max_width=6).update([wide[:, :2]], [wide[:, :7]])
    StreamingCKA(max_width=7).update([wide[:, :2]], [wide[:, :7]])


# -- dead layers, NaN --------------------------------------------------------------------------------------------------


@both
def test_dead_layer_keeps_to_itself(make: Any) -> None:
    data = made()
    a = {**data[0], "gone": torch.full((60, 2), 0.1)}
    metric = updated(make(), split((a, data[1]), 20))
    with pytest.warns(LightningMethodsWarning, match=r"features_a\['gone'\]") as caught:
        got = metric.compute()
    assert len(caught) == 1
    assert got[3].isnan().all()
    close(got[:3], updated(make(), split(data, 20)).compute(), 1e-12)
    with pytest.warns(LightningMethodsWarning):
        assert updated(make(zero_division=0.0), split((a, data[1]), 20)).compute()[3].tolist() == [0, 0]


@both
@pytest.mark.parametrize("at", [0, 30], ids=["first sample", "later"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_keeps_to_its_layer(make: Any, at: int, bad: float) -> None:
    a, _ = made()
    want = updated(make(), split((a, None), 20)).compute()
    broken = {**a, "layer1": a["layer1"].clone()}
    broken["layer1"][at] = bad
    metric = updated(make(zero_division=0.0), split((broken, None), 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = metric.compute()
    assert got[1].isnan().all()
    assert got[:, 1].isnan().all()
    close(got[[0, 2]][:, [0, 2]], want[[0, 2]][:, [0, 2]], 1e-12)
    metric.reset()
    close(updated(metric, split((a, None), 20)).compute(), want, 1e-12)


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_in_which_one_sample_is_active(dtype: torch.dtype) -> None:
    data = {k: v.to(dtype) for k, v in made()[0].items()}
    data["layer1"] = torch.zeros(60, 1, dtype=dtype)
    data["layer1"][17] = 0.3
    for make in METRICS.values():
        got = updated(make(), split((data, None), 20)).compute()
        assert got.isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]


# -- layers that are recognised ----------------------------------------------------------------------------------------


@both
def test_dicts_in_another_order_are_the_same_layers(make: Any) -> None:
    data = made()
    batches = split(data, 20)
    turned = [(dict(reversed(a.items())), dict(reversed((b or {}).items()))) for a, b in batches[1:]]
    close(updated(make(), [batches[0], *turned]).compute(), updated(make(), batches).compute(), 1e-14)


@both
def test_other_layers_than_before_are_refused(make: Any) -> None:
    a, b = made()
    metric = updated(make(), [(a, b)])
    with pytest.raises(InvalidArgument, match=r"\['layer0', 'x'\], and were \['layer0', 'layer1', 'layer2'\]"):
        metric.update({"layer0": a["layer0"], "x": a["layer1"]}, b)
    with pytest.raises(InvalidArgument, match="without names"):
        metric.update(list(a.values()), b)
    with pytest.raises(ShapeMismatch, match="3 and none"):
        metric.update(a)
    with pytest.raises(ShapeMismatch, match=r"features_b\['layer0'\] 9"):
        metric.update(a, {k: v[:9] for k, v in (b or {}).items()})
    metric.reset()
    metric.update(list(a.values()))
    with pytest.raises(ShapeMismatch, match=r"2 and none.*3 and none"):
        metric.update(list(a.values())[:2])
    with pytest.raises(InvalidArgument, match="features_a is empty"):
        metric.update([])


def test_streaming_refuses_other_widths() -> None:
    a, b = made()
    metric = updated(StreamingCKA(), [(a, b)])
    with pytest.raises(ShapeMismatch, match=r"of widths \[4, 1, 6, 5, 3\]"):
        metric.update({**a, "layer2": a["layer2"][:, :6]}, b)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MinibatchCKA(kernel="poly"), "kernel='poly'"),
        (lambda: MinibatchCKA(kernel="rbf", bandwidth=0.0), "bandwidth=0.0"),
        (lambda: MinibatchCKA(batch_weight="size"), "batch_weight='size'"),
        (lambda: StreamingCKA(max_width=0), "max_width=0"),
    ],
)
def test_settings_that_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        make()


@both
def test_tracks_no_gradient_and_changes_no_features(make: Any) -> None:
    x = torch.randn(20, 4, requires_grad=True)
    y = x * 2
    kept = y.detach().clone()
    metric = make()
    metric({"x": x, "y": y})
    assert not metric.compute().requires_grad
    assert torch.equal(y.detach(), kept)
    with torch.autocast("cpu", torch.bfloat16):
        again = make()
        again.update({"x": x, "y": y})
    close(again.compute(), metric.compute(), 1e-14)


# -- states ------------------------------------------------------------------------------------------------------------


@both
def test_forward_gives_the_value_of_the_batch_and_accumulates(make: Any) -> None:
    data = made(offset=40.0)
    batches = split(data, 20, 25, 15)
    metric = make()
    for batch in batches:
        close(metric(*batch), similarity_matrix(*batch, debiased=True))
    close(metric.compute(), updated(make(), batches).compute(), 1e-12)


@both
@quiet
def test_forward_of_a_batch_without_a_value_loses_nothing(make: Any) -> None:
    data = made()
    metric = make()
    batches = split(data, 20, 37, 3)
    values = [metric(*batch) for batch in batches]
    assert values[2].isnan().all()
    assert values[2].shape == (3, 2)
    close(metric.compute(), updated(make(), batches).compute(), 1e-12)
    with pytest.raises(InvalidArgument, match="and were"):
        metric({"other": torch.ones(5, 2)}, {"other": torch.ones(5, 2)})


def unlike(data: Batch) -> list[Batch]:
    """Return batches of which the second part has means far from those of the first."""
    a, b = data
    return split(({k: v + 20 * (torch.arange(60) > 29)[:, None] for k, v in a.items()}, b), 10)


@both
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("same", [False, True], ids=["two networks", "one"])
def test_merged_states_equal_one_metric_on_all_batches(make: Any, same: bool) -> None:
    batches = [(a, None if same else b) for a, b in unlike(made())]
    whole = updated(make(), batches).compute()
    for at in range(7):
        left, right = updated(make(), batches[:at]), updated(make(), batches[at:])
        left.merge_state(right)
        close(left.compute(), whole, 1e-12)
    other = updated(make(), [({"layer0": torch.randn(9, 2)}, None)])
    with pytest.raises(ShapeMismatch, match="or in another process"):
        left.merge_state(other)


class Ranks:
    """Two processes played by two threads, which exchange tensors where processes would."""

    def __init__(self) -> None:
        self.slots: list[Any] = [None, None]
        self.barrier = threading.Barrier(2, timeout=30)

    def gather(self, rank: int) -> Callable[..., list[Tensor]]:
        def exchanged(tensor: Tensor, group: Any = None) -> list[Tensor]:
            self.slots[rank] = tensor
            self.barrier.wait()
            found = list(self.slots)
            self.barrier.wait()
            return found

        return exchanged

    def share(self, metrics: list[Any]) -> None:
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(self._share, rank, metric) for rank, metric in enumerate(metrics)]
        for call in calls:
            call.result()

    def _share(self, rank: int, metric: Any) -> None:
        metric.sync(dist_sync_fn=self.gather(rank), distributed_available=lambda: True)


@quiet
@both
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("same", [False, True], ids=["two networks", "one"])
@pytest.mark.parametrize("at", [0, 2, 6], ids=["all on the second", "both", "all on the first"])
def test_ranks_share_one_value(make: Any, same: bool, at: int) -> None:
    batches = [(a, None if same else b) for a, b in unlike(made())]
    metrics = [updated(make(sync_on_compute=False), own) for own in (batches[:at], batches[at:])]
    before = [{name: getattr(m, name) for name in m._defaults} for m in metrics]
    Ranks().share(metrics)
    for metric, own in zip(metrics, before, strict=True):
        close(metric.compute(), updated(make(), batches).compute(), 1e-12)
        assert all(torch.equal(getattr(metric, name), value) for name, value in own.items())


@quiet
@both
def test_ranks_without_samples_or_with_other_layers(make: Any) -> None:
    data = made()
    metrics = [updated(make(sync_on_compute=False), own) for own in ([rows(data, slice(0))], [data])]
    Ranks().share(metrics)
    for metric in metrics:
        close(metric.compute(), updated(make(), [data]).compute(), 1e-12)
    empty = [make(sync_on_compute=False) for _ in range(2)]
    Ranks().share(empty)
    other = [updated(make(), own) for own in ([({"layer0": torch.randn(9, 2)}, None)], [data])]
    with pytest.raises(ShapeMismatch, match="or in another process"):
        Ranks().share(other)


def own_share() -> dict[str, Tensor]:
    """Run on each rank: unequal numbers of batches of unlike means, and on the second rank none at all."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, batches = dist.get_rank(), unlike(made())
    found = {}
    for name, make in METRICS.items():
        own = batches[:4] if rank == 0 else batches[4:]
        metric = updated(make(), own)
        found[name] = metric.compute()
        found[f"{name}, again"] = updated(metric, own[:1]).compute()
        found[f"{name}, one rank"] = updated(make(), batches[:4] if rank == 1 else []).compute()
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_two_processes_share_one_value(tmp_path: Path) -> None:
    first, second = run_ranks("tests.cka.test_metric:own_share", 2, tmp_path)
    batches = unlike(made())
    for name, make in METRICS.items():
        want = {name: batches, f"{name}, again": [*batches, batches[0], batches[4]], f"{name}, one rank": batches[:4]}
        for key, data in want.items():
            value = updated(make(), data).compute()
            close(first[key], value, 1e-12)
            close(second[key], value, 1e-12)


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float16),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(device, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "set_dtype": lambda m: m.set_dtype(torch.float16) if hasattr(m, "set_dtype") else m,
}


@both
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a module"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_sums_stay_in_float64(cast: Callable[[nn.Module], Any], inside: bool, make: Any) -> None:
    batches = split(made(), 20)
    metric = updated(make(), batches[:1])
    cast(nn.ModuleDict({"metric": metric, "linear": nn.Linear(1, 1)}) if inside else metric)
    updated(metric, batches[1:])
    assert torch.equal(metric.compute(), updated(make(), batches).compute())
    sums = {getattr(metric, name).dtype for name in metric._defaults if name != "layers"}
    assert sums == {torch.float64}
    metric.reset()
    assert torch.equal(updated(metric, batches).compute(), updated(make(), batches).compute())


@both
def test_moves_with_its_module(make: Any) -> None:
    metric = make().to("meta")
    assert {getattr(metric, name).device.type for name in metric._defaults} == {"meta"}
    assert {default.device.type for default in metric._defaults.values()} == {"meta"}


@both
def test_inference_mode_comes_and_goes(make: Any) -> None:
    batches = split(made(), 20)
    metric = make()
    with torch.inference_mode():
        updated(metric, batches[:1])
    updated(metric, batches[1:2])
    with torch.inference_mode():
        value = updated(metric, batches[2:]).compute()
    close(value, updated(make(), batches).compute(), 1e-14)


@both
@pytest.mark.parametrize("copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_on_where_the_original_was(copy: Callable[[Any], Any], make: Any) -> None:
    batches = split(made(), 20)
    metric = updated(make(), batches[:2])
    twin = copy(metric)
    assert torch.equal(updated(twin, batches[2:]).compute(), updated(metric, batches[2:]).compute())
    with pytest.raises(InvalidArgument, match="and were"):
        twin.update({"other": torch.ones(5, 2)})


@both
def test_state_dict_carries_the_sums_where_they_are_persistent(make: Any) -> None:
    batches = split(made(), 20)
    metric = updated(make(), batches[:2])
    assert metric.state_dict() == {}
    metric.persistent(True)
    twin = make()
    twin.persistent(True)
    twin.load_state_dict(metric.state_dict())
    assert torch.equal(updated(twin, batches[2:]).compute(), updated(metric, batches[2:]).compute())


def test_in_a_collection() -> None:
    batches = split(made(), 20)
    kinds = {"debiased": StreamingCKA(), "biased": StreamingCKA(debiased=False), "minibatch": MinibatchCKA()}
    together = MetricCollection(deepcopy(kinds))
    for batch in batches:
        together.update(*batch)
    for name, value in together.compute().items():
        assert torch.equal(value, updated(kinds[name], batches).compute())


def test_minibatch_average_is_near_the_exact_value() -> None:
    data = made(400, seed=3)
    exact = similarity_matrix(*data, debiased=True)
    assert (updated(MinibatchCKA(), split(data, 100)).compute() - exact).abs().max() < 0.03
    assert (similarity_matrix(*made(60), debiased=False) > similarity_matrix(*made(60), debiased=True)).all()
