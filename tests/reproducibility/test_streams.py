"""Varying one source changes that source alone, bit for bit, whatever happens around it."""

from __future__ import annotations

import os
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from lightning_methods import SeedStreams
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, UnsupportedTraining
from lightning_methods.reproducibility.seeding import Stream, seed_all
from tests.reproducibility.training import BATCH, EPOCHS, SIZE, Net, Noisy, Run, Split, changed

RESULT = {"final"}
CONTENT = {"batches", "final"}
# what else must differ: the content of the batches, and the result
FOLLOWS = {
    "init": RESULT,
    "split": CONTENT,
    "order": CONTENT,
    "augment": CONTENT,
    "dropout": RESULT,
    "evaluation": set(),
}


@pytest.fixture(scope="module", params=[(0, False), (2, False), (2, True)], ids=["main", "workers", "persistent"])
def workers(request):
    return request.param


@pytest.fixture(scope="module")
def base(workers, tmp_path_factory):
    return Run(tmp_path_factory.mktemp("base"), data=Split(*workers))


def test_the_same_seeds_give_the_same_training(base, workers, tmp_path):
    again = Run(tmp_path, data=Split(*workers), before=1)
    assert changed(base, again) == set()
    assert again.module.val_noise == base.module.val_noise
    assert set(base.found) == {"init", "split", "order", "augment", "dropout", "evaluation", "batches", "final"}


@pytest.mark.parametrize("source", FOLLOWS)
def test_one_source_changes_alone(base, workers, tmp_path, source):
    varied = Run(tmp_path, {source: 1}, data=Split(*workers))
    assert changed(base, varied) == {source} | FOLLOWS[source]
    assert (varied.module.val_noise == base.module.val_noise) == (source != "evaluation")


def test_the_number_of_workers_changes_nothing(tmp_path):
    """The noise of a batch is keyed by the batch, not by the process that fetches it."""
    alone, helped = Run(tmp_path), Run(tmp_path, data=Split(2, True))
    assert changed(alone, helped) <= {"augment"}  # the main process draws no noise of its own with workers
    assert alone.final == helped.final


class Draws(pl.Callback):
    """Draws random numbers wherever a callback can, once a training has begun."""

    def _draw(self, *_, **__):
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        random.random()

    on_sanity_check_start = on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = _draw
    on_train_epoch_end = on_validation_start = on_validation_batch_start = on_validation_end = _draw
    on_before_zero_grad = on_before_backward = on_after_backward = on_fit_start = _draw


@pytest.mark.parametrize(
    "around",
    [
        {"num_sanity_val_steps": 0},
        {"check_val_every_n_epoch": 3},
        {"val_check_interval": 2},
        {"limit_val_batches": 0},
        {"logger": True},
        {"enable_checkpointing": True},
        {"enable_progress_bar": True},
        {"net": {"draws_in_validation": 5}},
        {"before": 99},
    ],
    ids=lambda around: next(iter(around)),
)
def test_what_happens_around_changes_nothing(tmp_path, around):
    quiet, loud = Run(tmp_path), Run(tmp_path, **around)
    assert changed(quiet, loud) <= {"evaluation"}


@pytest.mark.parametrize("before_us", [False, True])
def test_other_callbacks_that_draw_change_nothing(tmp_path, before_us):
    quiet, loud = Run(tmp_path), Run(tmp_path, callbacks=[Draws()])
    if before_us:
        streams = SeedStreams()
        streams.seed("init")
        loud.module = Net()
        streams.seed("split")
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(
            max_epochs=EPOCHS, callbacks=[Draws(), streams], accelerator="cpu", enable_model_summary=False, **settings
        ).fit(loud.module, datamodule=Split())
        assert streams.fingerprints["final"] == quiet.final
        return
    assert changed(quiet, loud) <= {"augment", "dropout"}  # states that were read after a callback had drawn
    assert quiet.final == loud.final


def test_dropout_and_order_are_paired_where_plain_seeding_is_not(tmp_path):
    """Setting p=0 leaves the batches as they are; with one global seed they change."""
    with_dropout, without = Run(tmp_path), Run(tmp_path, net={"p": 0.0})
    assert changed(with_dropout, without) == {"dropout", "final"}

    def plain(p):
        pl.seed_everything(3, verbose=False)
        module = Net(p)
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", enable_model_summary=False, **settings).fit(
            module, datamodule=Split()
        )
        return module.batches

    pairs = list(zip(plain(0.3), plain(0.0), strict=True))
    os.environ.pop("PL_GLOBAL_SEED", None)
    assert not all(torch.equal(a[1], b[1]) for a, b in pairs)


# -- epochs, accumulation, resume --------------------------------------------------------------------------------------


def test_epochs_differ_and_seeds_share_no_epoch(tmp_path):
    """With `seed + epoch` as the key, epoch 1 of seed 0 would be epoch 0 of seed 1."""
    data = DataLoader(Noisy(quiet=True), SIZE, shuffle=True)
    orders = []
    for seed in (0, 1):
        orders += [x for _, x in Run(tmp_path, {"order": seed}, loaders=data).module.batches]
    assert len(orders) == 2 * EPOCHS
    assert not any(torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def test_accumulation_sees_the_same_batches(tmp_path):
    assert changed(Run(tmp_path), Run(tmp_path, accumulate_grad_batches=2)) == {"final"}


@pytest.mark.parametrize("workers", [(0, False), (2, True)], ids=["main", "persistent"])
def test_resume_at_the_end_of_an_epoch_is_exact(tmp_path, workers):
    whole = Run(tmp_path, data=Split(*workers))
    saved = tmp_path / "two.ckpt"
    reloaded = Run(tmp_path, data=Split(*workers), reload_dataloaders_every_n_epochs=1)
    assert changed(whole, reloaded) == set()

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(saved)

    Run(tmp_path, data=Split(*workers), callbacks=[Saves()], max_epochs=2)
    resumed = Run(tmp_path, data=Split(*workers), ckpt_path=saved, before=5)
    assert changed(whole, resumed) == set()


def test_resume_with_other_seeds_is_warned_about(tmp_path):
    saved = tmp_path / "one.ckpt"
    Run(tmp_path, max_epochs=1).trainer.save_checkpoint(saved)
    streams = SeedStreams(order=4)
    with pytest.warns(LightningMethodsWarning, match="other seeds of order"):
        streams.load_state_dict(torch.load(saved, weights_only=True)["callbacks"]["SeedStreams"])


def test_two_fits_in_a_process_are_the_same_and_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    torch.manual_seed(7)
    expected = torch.rand(3)
    first = Run(tmp_path, before=7)
    streams, module = SeedStreams(), Net()
    torch.manual_seed(7)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=streams, enable_model_summary=False, **quiet)
    strategy = dict(vars(trainer.strategy))
    data = DataLoader(Noisy(), BATCH, shuffle=True)
    own = dict(vars(data))
    trainer.fit(module, data)
    assert torch.equal(torch.rand(3), expected)
    assert os.environ["PL_GLOBAL_SEED"] == "12"
    assert vars(trainer.strategy).keys() == strategy.keys()
    assert {k: v for k, v in vars(data).items() if k in own} == own
    assert changed(first, Run(tmp_path, before=8)) == set()


def test_a_crash_leaves_no_trace(tmp_path):
    class Crashes(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("crash")

    streams = SeedStreams()
    trainer = pl.Trainer(callbacks=[streams, Crashes()], accelerator="cpu", logger=False, enable_checkpointing=False)
    torch.manual_seed(7)
    with pytest.raises(RuntimeError, match="crash"):
        trainer.fit(Net(), DataLoader(Noisy(), BATCH))
    seen = torch.rand(3)
    torch.manual_seed(7)
    Net()
    assert torch.equal(seen, torch.rand(3))
    assert "training_step" not in vars(trainer.strategy)


# -- loaders of every kind ---------------------------------------------------------------------------------------------


class Lazy(Sampler):
    """Draws each index when it is asked for, from all three generators."""

    def __len__(self):
        return SIZE

    def __iter__(self):
        for _ in range(SIZE):
            yield int(torch.randint(SIZE, ())) ^ random.randrange(2) ^ int(np.random.randint(2))  # noqa: NPY002


def _loaders(name):
    data = Noisy(quiet=True)
    if name == "weighted":
        return DataLoader(data, BATCH, sampler=WeightedRandomSampler(torch.arange(1.0, SIZE + 1), SIZE))
    if name == "batch sampler":
        return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), BATCH, drop_last=True))
    if name == "lazy":
        return DataLoader(data, BATCH, sampler=Lazy())
    if name == "unbatched":
        return DataLoader(
            data, batch_size=None, sampler=RandomSampler(data), collate_fn=lambda row: [v[None] for v in row]
        )
    if name == "list":
        return [DataLoader(data, BATCH, shuffle=True), DataLoader(data, BATCH, shuffle=True)]
    return {"a": DataLoader(data, BATCH, shuffle=True), "b": DataLoader(data, 2 * BATCH, shuffle=True)}


class ManyNet(Net):
    """Takes a batch, or a list or dict of them."""

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else batch if isinstance(batch[0], list) else [batch]
        return sum(super(ManyNet, self).training_step(part, batch_idx) for part in parts)


@pytest.mark.parametrize("reload", [0, 1])
@pytest.mark.parametrize("name", ["weighted", "batch sampler", "lazy", "unbatched", "list", "dict"])
def test_loaders_of_every_kind(tmp_path, name, reload, monkeypatch):
    monkeypatch.setattr("tests.reproducibility.training.Net", ManyNet)
    settings = {"reload_dataloaders_every_n_epochs": reload, "max_epochs": 2}
    base, again, varied = (
        Run(tmp_path, {"order": order}, loaders=_loaders(name), before=before, **settings)
        for before, order in ((0, 0), (1, 0), (0, 1))
    )
    assert changed(base, again) == set()
    assert changed(base, varied) == {"order"} | CONTENT
    if name == "list":  # two loaders are not in step
        first, second = (x for _, x in base.module.batches[:2])
        assert not torch.equal(first, second)


def test_loaders_that_are_passed_stay_as_they_are(tmp_path):
    loader = DataLoader(Noisy(), BATCH, shuffle=True)
    before = dict(vars(loader))
    Run(tmp_path, loaders=loader)
    assert vars(loader) == before


def test_a_combined_loader_is_the_users_again(tmp_path):
    """Lightning puts the loaders it runs into the CombinedLoader that it was given."""
    data = DataLoader(Noisy(quiet=True), BATCH, shuffle=True)
    together = CombinedLoader(data, "max_size_cycle")
    first = Run(tmp_path, {"order": 1}, loaders=together)
    second = Run(tmp_path, {"order": 2}, loaders=together)
    assert changed(first, Run(tmp_path, {"order": 1}, loaders=data)) == set()
    assert changed(second, Run(tmp_path, {"order": 2}, loaders=data)) == set()
    drawn = []
    for loader in (together.flattened[0], data):
        torch.manual_seed(4)
        drawn.append(torch.cat([x for x, _ in loader]))
    assert torch.equal(*drawn)


def test_a_generator_of_ones_own_is_kept_or_passed_over(tmp_path):
    def run(order, force, seed=0):
        generator = torch.Generator().manual_seed(seed)
        data = DataLoader(Noisy(quiet=True), BATCH, shuffle=True, generator=generator)
        done = Run(tmp_path, {"order": order, "force": force}, loaders=data)
        return done, generator

    kept, generator = run(0, False)
    assert changed(kept, run(1, False)[0]) == set()
    assert changed(kept, run(0, False, seed=1)[0]) == {"order"} | CONTENT
    forced, generator = run(0, True)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
    assert changed(forced, run(1, True)[0]) == {"order"} | CONTENT
    assert changed(forced, run(0, True, seed=1)[0]) == set()
    with pytest.warns(LightningMethodsWarning, match="a generator of its own"):
        _fit(SeedStreams(), DataLoader(Noisy(), BATCH, shuffle=True, generator=torch.Generator()))


def test_an_initialiser_of_workers_is_still_called(tmp_path):
    def mark(worker):
        (tmp_path / f"worker{worker}").touch()

    data = Split(2, worker_init_fn=mark)
    assert Run(tmp_path, data=data, max_epochs=1).final == Run(tmp_path, max_epochs=1).final
    assert sorted(p.name for p in tmp_path.glob("worker*")) == ["worker0", "worker1"]


class Stream3(IterableDataset):
    def __iter__(self):
        for i in torch.randperm(SIZE).tolist():
            yield Noisy(quiet=True)[i]


def test_iterables_draw_from_augment(tmp_path):
    base, again, varied = (
        Run(tmp_path, {"augment": seed}, loaders=DataLoader(Stream3(), BATCH), before=before)
        for before, seed in ((0, 0), (1, 0), (0, 1))
    )
    assert changed(base, again) == set()
    assert {"augment", "batches"} <= changed(base, varied)


class NotALoader:
    """Batches made on the fly."""

    def __len__(self):
        return 4

    def __iter__(self):
        for _ in range(4):
            x = torch.randn(BATCH, 6)
            yield x, (x.sum(1) > 0).long()


def test_other_iterables_draw_from_augment(tmp_path):
    base, again = (Run(tmp_path, loaders=NotALoader(), before=b, val_check_interval=2 if b else 1.0) for b in (0, 1))
    assert changed(base, again) == set()
    assert "batches" in changed(base, Run(tmp_path, {"augment": 1}, loaders=NotALoader()))


# -- bootstrap and rounding --------------------------------------------------------------------------------------------


def test_bootstrap_draws_the_training_set_with_replacement(tmp_path):
    data = DataLoader(Noisy(quiet=True), BATCH, shuffle=True)
    rows = Noisy(quiet=True).x

    def seen(run):
        epochs = [torch.cat([x for e, x in run.module.batches if e == epoch]) for epoch in range(2)]
        return [sorted((rows[None] == x[:, None]).all(-1).nonzero()[:, 1].tolist()) for x in epochs]

    one = Run(tmp_path, {"bootstrap": True}, loaders=data)
    first, second = seen(one)
    assert first == second
    assert len(first) == SIZE
    assert 0.5 < len(set(first)) / SIZE < 0.8  # 1 - 1/e of the examples
    other = Run(tmp_path, {"bootstrap": True, "split": 1}, loaders=data)
    assert changed(one, other) == {"split"} | CONTENT
    with pytest.raises(UnsupportedTraining, match="a length and indices"):
        Run(tmp_path, {"bootstrap": True}, loaders=DataLoader(Stream3(), BATCH))


def test_one_ulp_moves_one_weight(tmp_path):
    plain, moved = Run(tmp_path, max_epochs=0), Run(tmp_path, {"numerical": 3}, max_epochs=0)
    pairs = zip(plain.module.parameters(), moved.module.parameters(), strict=True)
    differing = [(a[a != b], b[a != b]) for a, b in pairs]
    before, after = torch.cat([a for a, _ in differing]), torch.cat([b for _, b in differing])
    assert len(before) == 1
    assert torch.equal(after, torch.nextafter(before, torch.full_like(before, torch.inf)))
    assert "[" in moved.found["numerical"]
    other = Run(tmp_path, {"numerical": 4}, max_epochs=0)
    assert other.found["numerical"] != moved.found["numerical"]
    assert changed(Run(tmp_path, {"numerical": 3}), Run(tmp_path, {"numerical": 4})) >= {"numerical", "final"}


def test_threads_are_drawn_and_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    threads = torch.get_num_threads()
    inside = []

    class Looks(pl.Callback):
        def on_train_start(self, *_):
            inside.append(torch.get_num_threads())

    for seed in range(8):
        Run(tmp_path, {"numerical": seed, "numerical_kind": "threads"}, callbacks=[Looks()], max_epochs=1)
    assert set(inside) <= {1, 2, 3}
    assert len(set(inside)) > 1
    assert torch.get_num_threads() == threads
    quiet = Run(tmp_path, {"numerical": 1, "numerical_kind": "hardware"})
    assert quiet.final == Run(tmp_path).final


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": -1}, "order=-1: a seed is a whole number"),
        ({"init": 1.5}, "init=1.5"),
        ({"augment": True}, "augment=True"),
        ({"numerical": 2**63}, "numerical="),
        ({"numerical_kind": "upl"}, "Did you mean 'ulp'"),
        ({"fingerprint": "ful"}, "Did you mean 'full'"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        SeedStreams(**settings)


def test_only_what_is_built_outside_is_seeded_by_hand():
    with pytest.raises(InvalidArgument, match="source='order'"):
        SeedStreams().seed("order")


def test_one_in_a_trainer():
    with pytest.raises((InvalidArgument, RuntimeError), match=r"one SeedStreams|more than one stateful"):
        _fit([SeedStreams(), SeedStreams(order=1)], DataLoader(Noisy(), BATCH))


def test_a_module_without_weights_cannot_be_moved():
    class Empty(Net):
        def __init__(self):
            super().__init__()
            self.net.requires_grad_(False)
            self.log_scale = torch.nn.Parameter(torch.zeros(3))

        def training_step(self, batch, batch_idx):
            return self.log_scale.sum()

    with pytest.raises(UnsupportedTraining, match="trained weight that is not zero"):
        _fit(SeedStreams(numerical=0), DataLoader(Noisy(), BATCH), Empty())


def test_fingerprints_can_be_left_out(tmp_path):
    assert Run(tmp_path, {"fingerprint": "off"}).found == {}
    assert "batches" not in Run(tmp_path, {"fingerprint": "light"}).found


@pytest.mark.parametrize("key", [0, 2**32 - 1, 2**63 - 1])
def test_a_key_seeds_what_the_libraries_own_functions_would(key):
    def draws():
        # normal numbers come in pairs, of which one waits for the next call
        return np.random.randn(3).tolist(), random.gauss(0, 1), random.random(), torch.rand(3).tolist()  # noqa: NPY002

    np.random.randn()  # noqa: NPY002
    random.gauss(0, 1)
    seed_all(key)
    ours = draws()
    np.random.seed(key % 2**32)  # noqa: NPY002
    random.seed(key)
    torch.manual_seed(key)
    assert draws() == ours


def test_keys_are_hashes_of_the_place():
    keys = {Stream(s, n).key(a, b) for s in ("a", "b") for n in range(4) for a in range(4) for b in range(4)}
    assert len(keys) == 2 * 4**3
    assert all(0 <= key < 2**63 for key in keys)


def _fit(callbacks, loader, module=None):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(module or Net(), loader)


def test_what_is_logged(tmp_path):
    Run(tmp_path, {"order": 5}, logger=pl.loggers.CSVLogger(tmp_path), max_epochs=1)
    (table,) = tmp_path.rglob("seed_streams/fingerprints_*.csv")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert rows[0] == ["source", "seed", "fingerprint"]
    found = {source: (seed, digest) for source, seed, digest in rows[1:]}
    assert found["order"][0] == "5"
    assert all(len(found[name][1]) == 16 for name in ("init", "split", "order", "augment", "dropout", "final"))
