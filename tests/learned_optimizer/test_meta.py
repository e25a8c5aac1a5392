"""Meta-training in the ordinary Trainer, tasks, what is exported, and what is drawn."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F

from lightning_methods import DigitsDataModule, LearnedOptimizer, MetaTraining, TruncationSchedule
from lightning_methods.errors import InvalidArgument, UnsupportedTraining
from lightning_methods.learned_optimizer import Architecture, ClassifierFamily, ModuleTask, load_weights, showing
from lightning_methods.learned_optimizer.estimators import ESTIMATORS
from lightning_methods.learned_optimizer.problem import InnerTraining
from lightning_methods.learned_optimizer.seeding import generator_of, seed_of
from lightning_methods.models import MLP
from tests.learned_optimizer import jobs
from tests.support.processes import run_ranks


def made_task(module=None, **settings):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 5, generator=generator) + 2 * F.one_hot(y, 5)
    return ModuleTask(module or nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), x, y, **settings)


def fit(model, steps, folder, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        **{"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", "default_root_dir": folder},
        **{"enable_model_summary": False, "limit_val_batches": 0, **quiet, **settings},
    )
    trainer.fit(model)
    return trainer


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_makes_it_better(estimator, tmp_path):
    def outer_loss(model):
        return model.evaluate(model.tasks[0], steps=12, seeds=4).mean().item()

    online = estimator in ("pes", "nres")
    settings = {"unroll": 4, "horizon": 12} if online else {"unroll": 12}
    model = MetaTraining(
        [made_task()], hidden_size=8, step_mult=0.02, estimator=estimator, num_pairs=8 if online else 4, **settings
    )
    model.outer_lr = 0.02
    before = outer_loss(model)
    trainer = fit(model, 40, tmp_path)
    assert outer_loss(model) < before - 0.1
    shown = {k.partition("/")[2]: float(v) for k, v in trainer.callback_metrics.items()}
    assert shown["inner_steps"] == settings["unroll"] * 2 * model.num_pairs
    assert ("reparam_weight" in shown) == (estimator == "merged")
    assert shown["diverged"] == 0


@pytest.mark.slow
def test_a_minute_of_meta_training_lowers_the_outer_loss_by_two_fifths(tmp_path):
    data = DigitsDataModule(batch_size=32)
    task = ModuleTask(MLP(64, (16,)), batch_size=16)
    model = MetaTraining(
        [task],
        features="paper",
        step_mult=0.01,
        unroll=TruncationSchedule("exponential", 5, 40, over_steps=80),
        outer_lr=0.01,
    )
    trainer = Trainer(max_steps=110, max_epochs=-1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    data.setup("fit")
    before = MetaTraining([task.with_data(*jobs.samples(data))], features="paper", step_mult=0.01)
    first = before.evaluate(before.tasks[0], steps=40).mean()
    trainer.fit(model, data)
    assert model.evaluate(model.tasks[0], steps=40).mean() < 0.6 * first


@pytest.mark.parametrize(("clock", "width"), [(None, 6), (4, 6), (4, 5)], ids=["learned", "late", "wide"])
@pytest.mark.parametrize("features", ["paper", "signal", "small_fc"])
def test_what_is_exported_trains_as_meta_training_did(features, clock, width, tmp_path):
    model = MetaTraining(
        [made_task()], features=features, normalize_step=features == "signal", unroll=2, step_mult=0.01, clock=clock
    )
    fit(model, 1, tmp_path)
    assert load_weights(model.export(tmp_path / "mine.json")).width == 6
    path = model.export(tmp_path / "mine.json", note="a test", width=width)
    card = load_weights(path).card
    assert card["note"] == "a test"
    assert card["outer_steps"] == 1
    assert card["horizon"] == 2
    assert card.get("clock") == clock

    task, seeds, steps = model.tasks[0], [seed_of("evaluation", 0)], 10
    problem = InnerTraining(model.architecture, task, clock=clock, width=width)
    theta = model.theta.detach().expand(2, -1)
    state = problem.begin(theta, seeds)
    rows, outer = problem._batches(state["order"], seeds, steps)
    wanted, after = problem.unroll(theta, state, 0, steps, seeds, differentiable=False)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    for p, first in zip(net.parameters(), task.initial(seed_of(seeds[0], "initial")), strict=True):
        p.data.copy_(first)
    optimizer = LearnedOptimizer(net.parameters(), weights=path, guard=clock is not None)
    for t in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(task.inputs[rows[t, 0]]), task.targets[rows[t, 0]]).backward()
        optimizer.step()
        with torch.no_grad():
            loss = F.cross_entropy(net(task.inputs[outer[t, 0]]), task.targets[outer[t, 0]])
        assert loss.item() == pytest.approx(wanted[0, t].item(), abs=1e-5)
    for i, p in enumerate(net.parameters()):
        torch.testing.assert_close(p.detach(), after[f"p{i}"][0], rtol=0, atol=1e-6)


def test_the_same_seed_the_same_weights_and_another_start(tmp_path):
    a, b = (MetaTraining([made_task()], unroll=2, hidden_size=4) for _ in range(2))
    for model in (a, b):
        fit(model, 2, tmp_path)
    assert torch.equal(a.theta, b.theta)
    path = a.export(tmp_path / "a.json")
    model = MetaTraining([made_task()], start=str(path))
    assert torch.equal(model.theta, a.theta)
    assert model.architecture == a.architecture


@pytest.mark.parametrize("variance", ["same", "split", "ema"])
def test_variances(variance, tmp_path):
    model = MetaTraining([made_task()], unroll=2, hidden_size=4, num_pairs=4, variance=variance, tasks_per_step=2)
    trainer = fit(model, 2, tmp_path)
    assert 0 <= float(trainer.callback_metrics["meta/reparam_weight"]) <= 1
    one = MetaTraining([made_task()], unroll=2, hidden_size=4, num_pairs=1, variance="ema")
    fit(one, 2, tmp_path)
    assert not torch.equal(one.theta, one.architecture.initial(generator_of(0, "theta")))


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_pairs(tmp_path):
    ranks = run_ranks("tests.learned_optimizer.jobs:distributed", 2, tmp_path)
    alone = jobs.trained(4)
    for name, theta in alone.items():
        for rank in ranks:
            torch.testing.assert_close(rank[name], theta, rtol=0, atol=1e-6, msg=name)


# -- tasks -------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(x + torch.tanh(self.a(x)))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Flatten(), nn.Linear(5, 3)),
        Residual(),
        nn.Sequential(nn.Linear(5, 4, bias=False), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)),
    ],
    ids=["unflatten", "residual", "norm"],
)
def test_any_module_is_a_task(module):
    task = made_task(module)
    assert not task.is_fast
    problem = InnerTraining(Architecture(hidden_size=4), task)
    theta = problem.form.architecture.initial(torch.Generator().manual_seed(0)).expand(4, -1)
    losses, _ = problem.unroll(theta, problem.begin(theta, [0, 1]), 0, 3, [0, 1], differentiable=False)
    assert losses.shape == (4, 3)
    assert bool(losses.isfinite().all())


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)],
        [
            nn.Conv2d(2, 4, (3, 2), bias=False, dilation=(1, 2)),
            nn.MaxPool2d(2),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ],
        [nn.Conv2d(2, 4, 2, padding="valid"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)],
    ],
)
def test_chains_are_fast_and_the_same(layers):
    x, y = torch.randn(2, 4, 2, 5, 5), torch.randint(3, (2, 4))
    task = ModuleTask(nn.Sequential(*layers), torch.randn(9, 2, 5, 5), torch.arange(9) % 3)
    assert task.is_fast
    params = [torch.stack([p, 2 * p]) for p in task.initial(0)]
    fast = task.losses(params, x, y)
    task._chain = None
    torch.testing.assert_close(fast, task.losses(params, x, y))


def test_families_draw_networks_classes_and_batches():
    images = torch.randn(90, 1, 6, 6)
    family = ClassifierFamily(images, torch.arange(90) % 5, widths=(8, 24), batch_sizes=(4, 16), conv=0.5)
    tasks = [family.sample(seed) for seed in range(40)]
    assert {"conv", "mlp"} == {t.name.partition("/")[2][: 4 if "conv" in t.name else 3] for t in tasks}
    assert {int(t.targets.max()) + 1 for t in tasks} == {2, 3, 4, 5}
    assert all(4 <= t.batch_size <= 16 and t.is_fast for t in tasks)
    assert all(sum(p.numel() for p in t.module.parameters()) < 10_000 for t in tasks)
    again = family.sample(7)
    assert again.name == tasks[7].name
    assert torch.equal(again.targets, tasks[7].targets)
    assert all(torch.equal(a, b) for a, b in zip(again.initial(1), tasks[7].initial(1), strict=True))


def test_regression_tasks():
    x = torch.randn(30, 4)
    task = ModuleTask(nn.Linear(4, 1), x, x.sum(1, keepdim=True), loss=F.mse_loss, batch_size=10)
    model = MetaTraining([task], start="lm-small")
    losses = model.evaluate(task, steps=100, seeds=2)
    assert losses[:, -1].mean() < losses[:, 0].mean()


def test_what_cannot_be_a_task_or_a_meta_training():
    with pytest.raises(UnsupportedTraining, match="running statistics"):
        ModuleTask(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    for make in (
        lambda: ModuleTask(nn.ReLU()),
        lambda: ModuleTask(nn.Linear(2, 2), torch.ones(3, 2)),
        lambda: ModuleTask(nn.Linear(2, 2), batch_size=0),
        lambda: ClassifierFamily(widths=(9, 3)),
        lambda: ClassifierFamily().sample(0),
        lambda: MetaTraining([]),
        lambda: MetaTraining([made_task()], num_pairs=1),
        lambda: MetaTraining([made_task()], num_pairs=1, variance="split"),
        lambda: MetaTraining([made_task()], estimator="tbptt"),
        lambda: MetaTraining([made_task()], sigma=0.0),
        lambda: MetaTraining([made_task()], clock=0),
        lambda: MetaTraining([made_task()], log_floor=0.0),
        lambda: MetaTraining([made_task()], start="nothing-such"),
        lambda: InnerTraining(Architecture(), ModuleTask(nn.Linear(2, 2))),
        lambda: InnerTraining(Architecture(), ModuleTask(nn.Linear(2, 2), torch.ones(1, 2), torch.ones(1))),
    ):
        with pytest.raises(InvalidArgument):
            make()


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_variance_explodes_with_the_unroll_and_smoothing_smooths():
    task, rule = made_task(batch_size=8), showing.chaotic("metz19", factor=10.0)
    rows = showing.estimator_variances(task, *rule, [2, 30], pairs=4)
    assert [row.steps for row in rows] == [2, 30]
    assert rows[0].reparam < rows[0].es
    assert rows[1].reparam / rows[1].es > 5 * rows[0].reparam / rows[0].es
    offsets = torch.linspace(-0.1, 0.1, 21)
    raw, smoothed = showing.loss_slice(task, *rule, 40, offsets, samples=8)
    rough = [float((x[2:] - 2 * x[1:-1] + x[:-2]).abs().mean()) for x in (raw, smoothed)]
    assert rough[1] < rough[0]
    assert len(showing.variance_figure(rows).axes[0].lines) >= 2
    assert len(showing.slice_figure(offsets, raw, smoothed).axes[0].lines) >= 2
