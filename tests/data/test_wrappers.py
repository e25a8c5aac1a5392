"""Label noise and class imbalance: exact numbers, determinism, nesting, and refusals."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_methods.data import DigitsDataModule, ImbalancedSubset, NoisyLabels, find_labels
from lightning_methods.data._strata import apportion, draw_stratified
from lightning_methods.data.images import collate
from lightning_methods.errors import BatchFormat, InvalidArgument


def made(n: int = 400, c: int = 4) -> TensorDataset:
    return TensorDataset(torch.arange(n).float(), torch.arange(n) % c)


class Items(Dataset):
    """Items without any attribute that names the labels."""

    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        return self.items[i]


# --- whole numbers from proportions


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=12),
    total=st.integers(0, 500),
    seed=st.integers(0, 99),
)
def test_apportion_is_whole_complete_and_within_one(weights: list[float], total: int, seed: int) -> None:
    w = np.array(weights)
    parts = apportion(w, total, np.random.default_rng(seed))
    assert parts.sum() == total
    assert (np.abs(parts - w / w.sum() * total) < 1 + 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), seed=st.integers(0, 99))
def test_draw_stratified_is_a_partition_in_proportion(data: st.DataObject, labels: list[int], seed: int) -> None:
    y = np.array(labels)
    size = data.draw(st.integers(0, len(y)))
    chosen, rest = draw_stratified(y, size, seed)
    assert len(chosen) == size
    assert sorted([*chosen, *rest]) == list(range(len(y)))
    expected = np.bincount(y) * size / len(y)
    assert (np.abs(np.bincount(y[chosen], minlength=len(expected)) - expected) < 1 + 1e-6).all()


# --- finding labels


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])),
        Subset(TensorDataset(torch.zeros(5), torch.tensor([9, 2, 0, 9, 1])), [1, 2, 4]),
        ConcatDataset([TensorDataset(torch.zeros(1), torch.tensor([c])) for c in (2, 0, 1)]),
        Items([(0.0, 2), (0.0, 0), (0.0, 1)]),
        Items([{"image": 0.0, "label": torch.tensor(c)} for c in (2, 0, 1)]),
    ],
    ids=["tensors", "subset", "concat", "tuples", "mappings"],
)
def test_labels_are_found(dataset: Dataset) -> None:
    assert find_labels(dataset).tolist() == [2, 0, 1]


@pytest.mark.parametrize("name", ["targets", "labels"])
def test_labels_by_attribute_are_not_read_from_the_items(name: str) -> None:
    dataset = Items(["no", "label"])
    setattr(dataset, name, np.array([1, 0]))
    assert find_labels(dataset).tolist() == [1, 0]


def test_target_transform_is_honoured() -> None:
    dataset = Items([(0.0, 1), (0.0, 0)])
    dataset.targets = [7, 8]
    dataset.target_transform = lambda label: label - 7
    assert find_labels(dataset).tolist() == [1, 0]


class Stream(IterableDataset):
    def __iter__(self) -> object:
        return iter([])


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Stream(), InvalidArgument, "map-style"),
        (TensorDataset(torch.zeros(3), torch.zeros(3)), InvalidArgument, "torch.float32"),
        (TensorDataset(torch.zeros(3), torch.zeros(3, 2).long()), InvalidArgument, r"\(3, 2\)"),
        (TensorDataset(torch.zeros(3)), BatchFormat, "no label"),
        (Items([{"image": 0, "text": 1}]), BatchFormat, "'image', 'text'"),
    ],
)
def test_labels_that_cannot_be_found(dataset: Dataset, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_labels(dataset)


# --- noisy labels


def test_uniform_noise_is_exact_and_never_the_true_class() -> None:
    noisy = NoisyLabels(made(), rate=0.37)
    assert noisy.is_noisy.sum() == 4 * 37
    observed = noisy.observed_transition()
    assert torch.allclose(observed.diag(), torch.full((4,), 0.63, dtype=torch.float64))
    assert ((observed - noisy.transition).abs() <= 0.01 + 1e-9).all()
    assert torch.equal(noisy.true_targets, torch.arange(400) % 4)


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=120),
    rate=st.floats(0, 1),
    kind=st.sampled_from(["uniform", "pair_flip"]),
    seed=st.integers(0, 99),
)
def test_every_class_has_its_rounded_share_of_noise(labels: list[int], rate: float, kind: str, seed: int) -> None:
    y = torch.tensor(labels)
    noisy = NoisyLabels(TensorDataset(y.float(), y), rate=rate, kind=kind, seed=seed, num_classes=5)
    for c in range(5):
        of_class = noisy.is_noisy[y == c]
        assert abs(int(of_class.sum()) - rate * len(of_class)) <= 0.5 + 1e-6
    assert noisy.targets.min() >= 0
    assert noisy.targets.max() < 5


def test_pair_flip_goes_to_the_next_class() -> None:
    noisy = NoisyLabels(made(), rate=0.25, kind="pair_flip")
    flipped = noisy.is_noisy
    assert flipped.sum() == 100
    assert torch.equal(noisy.targets[flipped], (noisy.true_targets[flipped] + 1) % 4)


def test_own_transition_is_met() -> None:
    t = [[1.0, 0, 0, 0], [0.1, 0.6, 0.3, 0], [0, 0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]]
    for form in (t, torch.tensor(t)):
        observed = NoisyLabels(made(), transition=form).observed_transition()
        assert torch.allclose(observed, torch.tensor(t, dtype=torch.float64), atol=0.011)


def test_noise_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = NoisyLabels(made(), rate=0.4, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(NoisyLabels(made(), rate=0.4, seed=3).targets, first.targets)
    assert not torch.equal(NoisyLabels(made(), rate=0.4, seed=4).targets, first.targets)


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "item",
    [(1.0, 0, "more"), [1.0, 0], {"x": 1.0, "label": 0}, Pair(1.0, 0), (1.0, torch.tensor(0, dtype=torch.int32))],
)
def test_items_keep_their_form_and_get_the_new_label(item: object) -> None:
    noisy = NoisyLabels(Items([item, item]), rate=1.0, num_classes=2)
    changed = noisy[0]
    assert type(changed) is type(item)
    key = "label" if isinstance(item, dict) else 1
    assert changed[key] == 1
    assert type(changed[key]) is type(item[key])
    assert item[key] == 0
    assert len(changed) == len(item)


def test_batches_and_items_agree_over_images_and_tensors() -> None:
    digits = DigitsDataModule()
    digits.setup("fit")
    for dataset in (digits.train_dataset, made()):
        noisy = NoisyLabels(dataset, rate=0.5)
        for how in (None, collate):
            x, y = next(iter(DataLoader(noisy, batch_size=16, collate_fn=how)))
            assert torch.equal(y, noisy.targets[:16])
            assert torch.equal(x, torch.stack([noisy[i][0] for i in range(16)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"rate": 0.1, "transition": [[1.0]]}, "exactly one"),
        ({"rate": 1.5}, r"rate=1\.5"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"rate": 0.1, "kind": "pairflip"}, "Did you mean 'pair_flip'"),
        ({"transition": torch.eye(3)}, r"\(3, 3\)"),
        ({"transition": torch.eye(4) * 0.9}, "Row 0"),
        ({"transition": torch.tensor([[1.0, 0, 0, 0]] * 3 + [[2.0, -1, 0, 0]])}, "Row 3"),
        ({"rate": 0.1, "num_classes": 3}, "from 0 to 3"),
        ({"rate": 0.1, "seed": -1}, "seed=-1"),
    ],
)
def test_noise_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        NoisyLabels(made(), **arguments)


def test_noise_needs_two_classes_and_an_example() -> None:
    with pytest.raises(InvalidArgument, match="one class"):
        NoisyLabels(made(c=1), rate=0.1)
    with pytest.raises(InvalidArgument, match="empty"):
        NoisyLabels(made(n=0), rate=0.1)


# --- imbalance


def test_long_tail_of_ten_balanced_classes_has_the_published_sizes() -> None:
    whole = made(50_000, 10)
    subset = ImbalancedSubset(whole, ratio=100)
    assert subset.counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert torch.bincount(subset.targets).tolist() == subset.counts
    assert torch.equal(torch.tensor([int(subset[i][1]) for i in range(50)]), subset.targets[:50])
    assert ImbalancedSubset(whole, ratio=100, profile="step").counts == [5000] * 5 + [50] * 5


@settings(max_examples=30, deadline=None)
@given(ratio=st.floats(1, 20), profile=st.sampled_from(["exponential", "step"]), c=st.integers(2, 6))
def test_ratio_is_met_up_to_rounding(ratio: float, profile: str, c: int) -> None:
    counts = ImbalancedSubset(made(120 * c, c), ratio=ratio, profile=profile).counts
    assert counts[0] == max(counts) == 120
    assert counts[-1] == int(120 / ratio + 1e-6)
    assert counts == sorted(counts, reverse=True)


def test_profile_fits_an_unbalanced_dataset() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10)
    assert ImbalancedSubset(TensorDataset(labels, labels), ratio=1).counts == [10, 10]


def test_counts_in_order_or_by_class() -> None:
    assert ImbalancedSubset(made(), counts=[1, 0, 100, 7]).counts == [1, 0, 100, 7]
    assert ImbalancedSubset(made(), counts={2: 5}).counts == [100, 100, 5, 100]


def test_smaller_draws_are_parts_of_larger_ones() -> None:
    small, large = (set(ImbalancedSubset(made(), counts=[n] * 4).indices) for n in (10, 30))
    assert small < large
    assert ImbalancedSubset(made(), counts=[10] * 4, seed=1).indices != sorted(small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"ratio": 2, "counts": [1] * 4}, "exactly one"),
        ({"ratio": 0.01}, "below 1"),
        ({"ratio": 101}, "At most 100"),
        ({"ratio": 2, "profile": "linear"}, "profile='linear'"),
        ({"counts": [1, 2]}, "4 classes"),
        ({"counts": [1, 2, 3, 101]}, "101 examples of class 3"),
        ({"counts": {9: 1}}, r"\[9\]"),
        ({"counts": [0] * 4}, "no example"),
        ({"ratio": 2, "seed": -1}, "seed=-1"),
    ],
)
def test_imbalance_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ImbalancedSubset(made(), **arguments)


# --- nesting


def test_noise_of_a_subset_and_subset_of_noise_keep_the_true_labels() -> None:
    outer_noise = NoisyLabels(ImbalancedSubset(made(), ratio=4), rate=0.4)
    assert torch.equal(outer_noise.true_targets, outer_noise.dataset.targets)
    subset = ImbalancedSubset(NoisyLabels(made(), rate=0.4), ratio=4)
    assert torch.equal(find_labels(subset), subset.targets)
    assert torch.equal(find_labels(subset, true=True), torch.tensor(subset.indices) % 4)


def test_noise_on_noise_compares_with_the_first_labels() -> None:
    twice = NoisyLabels(NoisyLabels(made(), rate=0.5, kind="pair_flip"), rate=1.0, kind="pair_flip")
    assert torch.equal(twice.true_targets, torch.arange(400) % 4)
    assert torch.equal(twice.observed_transition()[0], torch.tensor([0, 0.5, 0.5, 0], dtype=torch.float64))
    assert twice.is_noisy.all()


def test_a_class_without_examples_has_an_empty_row() -> None:
    noisy = NoisyLabels(made(c=2), rate=0.0, num_classes=3)
    assert noisy.observed_transition()[2].tolist() == [0, 0, 0]
