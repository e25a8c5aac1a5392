"""The fair comparison, its command, and the monitor of an optimizer's steps."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_methods import Classifier, DigitsDataModule, LearnedOptimizer, LearnedOptimizerMonitor
from lightning_methods.cli import main
from lightning_methods.errors import InvalidArgument
from lightning_methods.learned_optimizer import compare_optimizers
from lightning_methods.learned_optimizer.comparison import Comparison, OptimizerRun
from lightning_methods.learned_optimizer.weights import Weights, load_weights
from lightning_methods.models import MLP
from tests.support.training import TinyModule, fit, quiet_trainer


def made_module():
    return Classifier(MLP(64, (8,)))


def test_a_comparison(tmp_path):
    told = []
    result = compare_optimizers(
        made_module,
        DigitsDataModule(batch_size=128),
        baselines=["Adam", "SGD momentum"],
        learning_rates=[1e-6, 0.03],
        steps=12,
        points=3,
        tuning_seeds=[50],
        seeds=[0, 1],
        progress=told.append,
    )
    assert result.chosen["Adam"] == result.chosen["SGD momentum"] == 0.03
    assert math.isnan(result.chosen["lm-small"])
    assert len(told) == len(result.runs) == 2 * 2 + 3 * 2
    reported = [run.seed for run in result.runs if run.purpose == "report"]
    assert 50 not in reported
    for name in result.chosen:
        first, second = result.reported(name)
        assert first.steps == [4, 8, 12]
        assert first.mean_val == pytest.approx(sum(first.val) / 3)
        assert first.final_val == first.val[-1] != second.val[-1]
        assert 0 < first.test < 5
        assert first.seconds > 0
    columns, rows = result.table()
    assert [row[0] for row in rows] == ["Adam", "SGD momentum", "lm-small"]
    assert len(columns) == len(rows[0])
    runs, table, picture = result.save(tmp_path)
    assert len(list(csv.reader(runs.open()))) == 1 + len(result.runs)
    assert len(list(csv.reader(table.open()))) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = compare_optimizers(
        made_module, DigitsDataModule(batch_size=128), baselines=[], steps=12, points=3, seeds=[0], test_metric=None
    )
    assert again.runs[0].val == result.reported("lm-small")[0].val
    assert math.isnan(again.runs[0].test)


def test_steps_to_a_target():
    runs = [
        OptimizerRun("A", 0.1, s, "report", 1.0, 1.0, 1.0, 2.0, [10, 20], v)
        for s, v in ((0, [0.9, 0.4]), (1, [0.9, 0.8]))
    ]
    columns, rows = Comparison(runs, {"A": 0.1}, 0.5).table()
    cells = dict(zip(columns, rows[0], strict=True))
    assert cells["steps to target"] == "never (1 of 2)"
    assert cells["ms/step"] == "100.00"
    columns, rows = Comparison(runs[:1], {"A": 0.1}, 0.5).table()
    assert dict(zip(columns, rows[0], strict=True))["seconds to target"] == "2.00"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"criterion": "best"}, "mean_val"),
        ({"baselines": ["Adagrad"]}, "Adam"),
        ({"steps": 2, "points": 5}, "points"),
        ({"seeds": []}, "seed"),
        ({"monitor": "loss", "steps": 1, "points": 1, "baselines": []}, "val/loss"),
    ],
)
def test_comparisons_that_are_refused(settings, named):
    with pytest.raises(InvalidArgument, match=named):
        compare_optimizers(made_module, DigitsDataModule(batch_size=512), **settings)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    net = "{class_path: lightning_methods.models.MLP, init_args: {in_features: 64}}"
    config.write_text(f"model:\n  class_path: lightning_methods.Classifier\n  init_args:\n    net: {net}\n")
    assert main(["compare-optimizers", "--config", str(config)]) == 2
    assert "data" in capsys.readouterr().err
    assert main(["compare-optimizers"]) == 2
    assert "--config" in capsys.readouterr().err


def test_the_monitor_measures_gradient_descent_exactly(tmp_path):
    class Descent(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.25)

    monitor = LearnedOptimizerMonitor()
    trainer = quiet_trainer(tmp_path, callbacks=[monitor])
    fit(trainer, Descent())
    shown = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("learned_optimizer/")}
    assert shown["learned_optimizer/learning_rate"] == pytest.approx(0.25, rel=1e-4)
    assert 0 < shown["learned_optimizer/adam_cosine"] < 1
    assert 0 < shown["learned_optimizer/relative_step"] < 1
    assert "learned_optimizer/trust" not in shown


def test_the_monitor_shows_the_share_of_the_learned_step(tmp_path):
    given = load_weights("lm-small")
    weights = Weights("short", given.architecture, given.theta, {"clock": 2})

    class Learned(TinyModule):
        def configure_optimizers(self):
            return LearnedOptimizer(self.parameters(), weights=weights)

    trainer = quiet_trainer(tmp_path, callbacks=[LearnedOptimizerMonitor()], max_epochs=1)
    fit(trainer, Learned())
    share = [min(1.0, 2 / t) if t else 1.0 for t in range(trainer.global_step)]
    assert trainer.global_step > 3
    shown = float(trainer.callback_metrics["learned_optimizer/trust"])
    assert shown == pytest.approx(sum(share) / len(share))


def test_the_monitor_knows_adam(tmp_path):
    class Adam(TinyModule):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    monitor = LearnedOptimizerMonitor(every_n_steps=3)
    trainer = quiet_trainer(tmp_path, callbacks=[monitor])
    fit(trainer, Adam())
    assert float(trainer.callback_metrics["learned_optimizer/adam_cosine"]) == pytest.approx(1, abs=1e-3)
    assert 0 < float(trainer.callback_metrics["learned_optimizer/step_size"]) <= 0.011


def test_parameters_without_gradient_are_no_matter():
    net, monitor = nn.Linear(2, 2), LearnedOptimizerMonitor()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = SimpleNamespace(barebones=True, current_epoch=0)
    monitor.on_before_optimizer_step(trainer, net, optimizer)
    monitor.on_train_batch_end(trainer, net)
    assert monitor.state_dict()["tensors"] == {}
    with pytest.raises(InvalidArgument, match="every_n_steps"):
        LearnedOptimizerMonitor(every_n_steps=0)
