"""The weighted sampler: its expectation, its ranks, its epochs, and going on where it stopped."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_methods import DistributedWeightedSampler
from lightning_methods.errors import InvalidArgument
from tests.support.processes import run_ranks
from tests.support.training import quiet_trainer

WEIGHTS = [0.0, 1.0, 2.0, 5.0, 0.0]


def test_counts_have_the_expectation_that_the_weights_say():
    sampler = DistributedWeightedSampler(WEIGHTS, 1000)
    counts = torch.zeros(5)
    for epoch in range(200):
        sampler.set_epoch(epoch)
        counts += torch.bincount(torch.tensor(list(sampler)), minlength=5)
    p = torch.tensor(WEIGHTS) / 8
    error = (200_000 * p * (1 - p)).sqrt()
    assert ((counts - 200_000 * p).abs() <= 4 * error).all()


def test_the_mean_gradient_of_drawn_samples_is_the_weighted_gradient():
    """Two thousand epochs of drawing against the weights in the loss: within three standard errors."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 4, generator=generator), torch.rand(20, generator=generator)
    theta = torch.zeros(4, requires_grad=True)
    each = torch.stack([torch.autograd.grad(((row @ theta) - 1).square(), theta)[0] for row in x])
    weighted = (w[:, None] * each).sum(0) / w.sum()
    sampler, means = DistributedWeightedSampler(w, 20), []
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        means.append(each[list(sampler)].mean(0))
    drawn = torch.stack(means)
    assert ((drawn.mean(0) - weighted).abs() <= 3 * drawn.std(0) / math.sqrt(2000)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 3))
def test_the_ranks_together_are_one_process(ranks, total, drop_last, epoch):
    alone = DistributedWeightedSampler(WEIGHTS, total, num_replicas=1, rank=0)
    alone.set_epoch(epoch)
    whole, parts = list(alone), []
    for rank in range(ranks):
        part = DistributedWeightedSampler(WEIGHTS, total, num_replicas=ranks, rank=rank, drop_last=drop_last)
        part.set_epoch(epoch)
        parts.append(list(part))
        assert len(parts[-1]) == len(part) == part.num_samples
    assert len({len(part) for part in parts}) == 1
    joined = [index for row in zip(*parts, strict=True) for index in row]
    shared = min(len(joined), total)
    assert joined[:shared] == whole[:shared]
    assert len(joined) <= total if drop_last else total <= len(joined) < total + ranks


def test_an_epoch_is_always_the_same_and_another_one_another():
    sampler = DistributedWeightedSampler(WEIGHTS, 50)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(DistributedWeightedSampler(WEIGHTS, 50, seed=1)) != first
    state = torch.get_rng_state()
    list(sampler)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_goes_on_in_the_middle_of_an_epoch():
    sampler = DistributedWeightedSampler(WEIGHTS, 50)
    sampler.set_epoch(3)
    running = iter(sampler)
    taken = [next(running) for _ in range(20)]
    state = sampler.state_dict()
    resumed = DistributedWeightedSampler(WEIGHTS, 50)
    resumed.load_state_dict(state)
    resumed.set_epoch(3)  # as Lightning does at the start of the epoch
    rest = list(resumed)
    assert taken + rest == list(sampler)
    assert len(list(resumed)) == 50
    # another epoch starts at its start
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert len(list(resumed)) == 50


def test_without_replacement_every_item_comes_once_and_heavy_ones_first():
    weights = torch.arange(1.0, 101.0)
    first = torch.zeros(100)
    for epoch in range(300):
        sampler = DistributedWeightedSampler(weights, replacement=False)
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert sorted(drawn) == list(range(100))
        first[drawn[0]] += 1
    mean = float((first * weights).sum() / 300)
    expected = float(weights.square().sum() / weights.sum())
    assert mean == pytest.approx(expected, rel=0.1)
    assert list(DistributedWeightedSampler(WEIGHTS, 3, replacement=False)) != [0, 4]
    assert set(DistributedWeightedSampler(WEIGHTS, 3, replacement=False)) == {1, 2, 3}


def test_weights_far_apart_and_many():
    assert set(DistributedWeightedSampler([1e-300, 1e300], 100)) == {1}
    many = DistributedWeightedSampler(torch.ones(2**24 + 10), 4)  # more than torch.multinomial takes
    assert len(list(many)) == 4


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        ([0.0, 0.0], {}),
        ([-1.0], {}),
        ([math.nan], {}),
        ([], {}),
        ([[1.0]], {}),
        ([1.0], {"num_samples": 0}),
        ([1.0], {"num_samples": -1}),
        ([1.0], {"num_samples": 1.5}),
        ([1.0], {"num_samples": math.nan}),
        ([1.0], {"seed": 0.5}),
        (WEIGHTS, {"num_replicas": 0, "rank": 0}),
        (WEIGHTS, {"num_samples": 4, "replacement": False}),
        (WEIGHTS, {"rank": 0}),
        (WEIGHTS, {"num_replicas": 2, "rank": 2}),
    ],
)
def test_what_cannot_be_drawn(weights, more):
    with pytest.raises(InvalidArgument):
        DistributedWeightedSampler(weights, **more)


def test_epochs_and_states_that_are_none():
    sampler = DistributedWeightedSampler(WEIGHTS)
    for bad in (0.5, -1):
        with pytest.raises(InvalidArgument):
            sampler.set_epoch(bad)
    with pytest.raises(InvalidArgument, match="'epoch' and 'position'"):
        sampler.load_state_dict({"epoch": 1})


class Seen(pl.LightningModule):
    """Notes which samples come, by epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.epochs = {}

    def training_step(self, batch, batch_idx):
        (x,) = batch
        self.epochs.setdefault(self.current_epoch, []).extend(x[:, 0].int().tolist())
        return self.layer(x).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def items(sampler):
    return DataLoader(TensorDataset(torch.arange(5.0)[:, None]), batch_size=4, sampler=sampler)


def distributed_epochs():
    """Train on two ranks, with the sampler given to the loader and Lightning left to its defaults."""
    trainer = quiet_trainer("/tmp", strategy="ddp", devices=2, max_epochs=2)
    module, sampler = Seen(), DistributedWeightedSampler(WEIGHTS, 16, seed=5)
    trainer.fit(module, items(sampler))
    return {"kept": trainer.train_dataloader.sampler is sampler, "epochs": module.epochs}


def test_lightning_sets_the_epoch_and_a_distributed_sampler_is_left_alone(tmp_path):
    sampler = DistributedWeightedSampler(WEIGHTS, 16, seed=5)
    assert isinstance(sampler, DistributedSampler)  # which is what Lightning asks before it puts its own in place
    module = Seen()
    quiet_trainer(tmp_path, max_epochs=2).fit(module, items(sampler))
    for epoch, seen in module.epochs.items():
        sampler.set_epoch(epoch)
        assert seen == list(sampler)


@pytest.mark.slow
def test_two_ranks_of_a_trainer_see_one_draw(tmp_path):
    ranks = run_ranks("tests.importance_weighting.test_sampler:distributed_epochs", 2, tmp_path / "ranks")
    sampler = DistributedWeightedSampler(WEIGHTS, 16, seed=5)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        pairs = zip(*(rank["epochs"][epoch] for rank in ranks), strict=True)
        assert [index for pair in pairs for index in pair] == list(sampler)
    assert all(rank["kept"] for rank in ranks)
