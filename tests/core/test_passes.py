"""An extra pass in the middle of a training leaves no trace, reads what it should, and ends early without harm."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_methods.core.passes import batches, loaders_of, preserved
from lightning_methods.errors import InvalidArgument, UnsupportedTraining
from tests.support.training import (
    BATCH,
    At,
    Settings,
    TinyModule,
    assert_identical,
    fit,
    loader,
    made_data,
    quiet_trainer,
)


def random_numbers():
    return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002


class Stop(Exception):
    """What ends a pass early."""


# -- preserved ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_random_states_come_back(fails):
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
    net[1].eval()  # a frozen layer stays frozen
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    expected = random_numbers()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002

    def work():
        with preserved(net):
            net.eval()
            random_numbers()
            if fails:
                raise Stop

    if fails:
        with pytest.raises(Stop):
            work()
    else:
        work()
    assert random_numbers() == expected
    assert [m.training for m in net.modules()] == [True, True, False]


def shuffled(where):
    generator = torch.Generator().manual_seed(5)
    data = made_data()
    if where == "loader":
        return DataLoader(data, batch_size=BATCH, shuffle=True, generator=generator)
    return DataLoader(data, batch_size=BATCH, sampler=RandomSampler(data, generator=generator))


@pytest.mark.parametrize("where", ["loader", "sampler"])
def test_the_generators_of_loaders_come_back(where):
    loader = shuffled(where)
    with preserved(nn.ReLU(), loader):
        first = [y.tolist() for _, y in loader]
    assert [y.tolist() for _, y in loader] == first
    assert [y.tolist() for _, y in loader] != first


# -- a pass in a fit ---------------------------------------------------------------------------------------------------


def pass_over(loader="train", **settings):
    """Return a list and the callback that fills it with the batches of a pass in the middle of a fit."""
    seen = []

    def read(trainer, module):
        for batch in batches(trainer, module, loader, description="Reading", **settings):
            assert not module.training
            assert not torch.is_grad_enabled()
            seen.append(batch)

    return seen, At(2, read)


@pytest.mark.parametrize("stops", ["never", "early", "by an exception"])
@pytest.mark.parametrize("source", ["train", "val", "given"])
def test_the_training_is_the_one_without_the_pass(tmp_path, source, stops):
    def read(trainer, module):
        given = loader(shuffle=True) if source == "given" else source
        try:
            for i, (x, _) in enumerate(batches(trainer, module, given, description="Reading")):
                module(x)
                random_numbers()
                if i == 1 and stops == "early":
                    break
                if i == 1 and stops == "by an exception":
                    raise Stop
        except Stop:
            pass
        assert module.training
        assert torch.is_grad_enabled()

    trained = []
    for callbacks in ([], [At(2, read)]):
        torch.manual_seed(1)
        module = TinyModule(Settings(stochastic=True))
        fit(quiet_trainer(tmp_path, callbacks=callbacks), module, loader(shuffle=True))
        trained.append((module, torch.get_rng_state()))
    assert_identical(trained[0][0], trained[1][0])
    assert torch.equal(trained[0][1], trained[1][1])


@pytest.mark.parametrize(
    ("source", "trainer_settings", "settings", "count"),
    [
        ("train", {}, {}, 5),
        ("train", {}, {"limit": 2}, 2),
        ("train", {}, {"limit": 9}, 5),
        ("train", {"limit_train_batches": 3}, {}, 3),
        ("train", {"limit_train_batches": 3}, {"limit": 2}, 2),
        ("train", {"limit_train_batches": 0.6}, {}, 3),
        ("train", {"limit_train_batches": 1.0}, {}, 5),
        ("train", {"overfit_batches": 2}, {}, 2),
        ("val", {}, {}, 1),
        ("val", {"limit_val_batches": 0}, {}, 0),
        ("given", {"limit_train_batches": 3}, {}, 5),
        ("given", {"fast_dev_run": 2}, {}, 2),
        ("train", {"fast_dev_run": 2}, {}, 2),
        ("several", {}, {"limit": 2}, 4),
    ],
)
def test_limits(tmp_path, source, trainer_settings, settings, count):
    given = {"given": loader(), "several": [loader(), loader()]}.get(source, source)
    seen, callback = pass_over(given, **settings)
    fit(quiet_trainer(tmp_path, callbacks=[callback], **trainer_settings), TinyModule())
    assert len(seen) == count


class Stream(IterableDataset):
    def __init__(self):
        self.read = 0

    def __iter__(self):
        for x, y in zip(*made_data().tensors, strict=True):
            self.read += 1
            yield x, y


@pytest.mark.parametrize(("limit", "count", "read"), [(None, 5, 40), (2, 2, 16)])
def test_iterable_datasets_are_read_no_further_than_needed(tmp_path, limit, count, read):
    stream = Stream()
    seen, callback = pass_over(DataLoader(stream, batch_size=BATCH), limit=limit)
    fit(quiet_trainer(tmp_path, callbacks=[callback]), TinyModule())
    assert len(seen) == count
    assert stream.read == read


def test_batches_go_through_precision_and_the_modules_transfer_hooks(tmp_path):
    class Marks(TinyModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (*batch, "transferred") if self.trainer.training and marked else batch

    marked = False

    def read(trainer, module):
        nonlocal marked
        marked = True
        (x, _, mark), *_ = batches(trainer, module, "train", description="Reading")
        seen.append((x.dtype, mark, module(x).dtype))
        marked = False

    seen = []
    fit(quiet_trainer(tmp_path, callbacks=[At(2, read)], precision="64-true"), Marks())
    fit(quiet_trainer(tmp_path, callbacks=[At(2, read)], precision="bf16-true"), Marks())
    assert seen == [(torch.float64, "transferred", torch.float64), (torch.bfloat16, "transferred", torch.bfloat16)]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(InvalidArgument, match=f"limit={limit}: at least 1"):
        next(batches(quiet_trainer(tmp_path), TinyModule(), loader(), description="", limit=limit))


# -- which loaders -----------------------------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.stages = []

    def setup(self, stage):
        self.stages.append(stage)

    def train_dataloader(self):
        assert "fit" in self.stages
        return loader()

    def val_dataloader(self):
        return [loader(8), loader(16)]

    def test_dataloader(self):
        assert "test" in self.stages
        return {"near": loader(8), "far": loader(24)}


def loaders_in(trainer, run, **settings):
    """Return the lengths of the loaders of each name, asked for in the middle of a run."""
    found = {}

    class Asks(pl.Callback):
        def ask(self, trainer, *_):
            for name in ("train", "val", "test", "predict"):
                try:
                    found[name] = [len(one) for one in loaders_of(trainer, name)]
                except UnsupportedTraining as error:
                    found[name] = str(error)

        on_train_start = on_test_start = ask

    trainer.callbacks.append(Asks())
    run(trainer)
    return found


def test_loaders_of_a_datamodule_in_a_fit_and_not_yet_set_up_in_a_test(tmp_path):
    expected = {"train": [5], "val": [1, 2], "test": [1, 3]}
    module = TinyModule()
    module.test_step = module.validation_step = lambda batch, batch_idx, dataloader_idx=0: None
    for run in ("fit", "test"):
        found = loaders_in(
            quiet_trainer(tmp_path, num_sanity_val_steps=0),
            lambda trainer, run=run: getattr(trainer, run)(module, datamodule=Data()),
        )
        assert {name: found[name] for name in expected} == expected
        assert "no predict dataloader" in found["predict"]


def test_loaders_given_to_fit_and_those_that_are_nowhere(tmp_path):
    found = loaders_in(quiet_trainer(tmp_path), lambda trainer: fit(trainer, TinyModule()))
    assert (found["train"], found["val"]) == ([5], [1])
    assert "no test dataloader here. Pass the dataloader itself" in found["test"]


def test_loaders_of_the_module_itself(tmp_path):
    class WithData(TinyModule):
        def train_dataloader(self):
            return loader()

        def predict_dataloader(self):
            return loader(16)

    found = loaders_in(quiet_trainer(tmp_path), lambda trainer: trainer.fit(WithData()))
    assert (found["train"], found["predict"]) == ([5], [2])


def test_names_and_objects(tmp_path):
    trainer, one = quiet_trainer(tmp_path), loader()
    assert loaders_of(trainer, one) == [one]
    assert loaders_of(trainer, [one, one]) == [one, one]
    with pytest.raises(InvalidArgument, match="loader='valid' is not known"):
        loaders_of(trainer, "valid")
