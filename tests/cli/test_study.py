"""`study` and `compare` on configurations of LightningCLI."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from lightning_methods.cli import main
from lightning_methods.errors import InvalidArgument
from lightning_methods.reproducibility import Study
from tests.support.wandb_offline import read_runs

CONFIG = {
    "seed_everything": 7,
    "trainer": {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1, "accelerator": "cpu"},
    "model": {
        "class_path": "lightning_methods.Classifier",
        "init_args": {
            "net": {
                "class_path": "lightning_methods.models.MLP",
                "init_args": {"in_features": 64, "hidden": [16], "dropout": 0.5},
            }
        },
    },
    "data": {"class_path": "lightning_methods.DigitsDataModule", "init_args": {"flat": True}},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def write(home: Path, **changed: object) -> str:
    content = {
        "study": {"name": "made", "metric": "val/accuracy", "folder": "made"},
        "pipelines": {
            "with": {"config": ["base.yaml"]},
            "without": {"config": ["base.yaml"], "overrides": {"model.init_args.net.init_args.dropout": 0.0}},
        },
        "sources": {"replicates": 2},
        "engine": {"workers": 2, "retries": 0},
        **changed,
    }
    (home / "study.yaml").write_text(yaml.safe_dump(content))
    return "study.yaml"


@pytest.mark.slow
def test_a_study_of_configurations_from_plan_to_diff(home, capsys, monkeypatch):
    file = write(home, track={"wandb": {"project": "test", "mode": "offline"}})
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["study", "plan", file]) == 0
    assert "6 runs of with, without; 0 done" in capsys.readouterr().out
    assert main(["study", "run", file]) == 0
    told = capsys.readouterr().out
    assert "[6/6, 0 s left]" in told
    assert "with beat without in" in told
    assert "not enough runs to conclude (2; need 29" in told
    report = json.loads(Path("made/report.json").read_text())
    assert report["problems"] == []  # so the first run, made twice, was the same
    notices = " ".join(report["notices"])
    assert "seed_everything: 7 of the configuration is replaced" in notices
    assert "the seed of split is also given to data.init_args.seed" in notices
    shared = report["comparisons"][0]["shared"]
    # another rate of dropout leaves all others alone
    assert shared["split"]
    assert shared["order"]
    assert shared["init"]
    rows = list(csv.DictReader(Path("made/runs.csv").read_text().splitlines()))
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"done"}
    assert {"val/accuracy", "val/loss", "train/loss", "fingerprint.final", "seed.order"} <= set(rows[0])
    # nothing is run again
    assert main(["study", "status", file]) == 0
    assert "6 runs: 6 done" in capsys.readouterr().out
    assert main(["study", "diff", file, "with/0", "with/1"]) == 0
    assert "differ in: init, split, order, augment, dropout, final" in capsys.readouterr().out
    assert main(["study", "diff", file, "with/0", "with/repeat/0"]) == 0
    assert "drew the same from every source" in capsys.readouterr().out
    runs = read_runs("made")
    assert len({run.folder for run in runs}) >= 5
    summary = [run for run in runs if run.column("study/verdicts")]
    assert summary
    assert summary[0].media("study/scores")[0].is_file()
    assert summary[0].tables("study/runs")[0]["columns"][0] == "run_id"


@pytest.mark.slow
def test_reused_processes_equal_fresh_ones_bit_for_bit(home):
    write(home)
    found = [
        Study.from_yaml("study.yaml", folder=process, engine={"process": process}, replicates=2, check_repeat=False)
        for process in ("fork", "reuse")
    ]
    scores = [study.run().scores for study in found]
    assert scores[0] == scores[1]
    prints = [{i: r.fingerprints for i, r in study.ledger.runs().items()} for study in found]
    assert prints[0] == prints[1]


def test_compare_with_a_callback(home, capsys):
    command = ["compare", "--config", "base.yaml", "--with", "AugmentedDropout", "--with.p_forward=0.1"]
    command += [
        "--with.p_backward=0.3",
        "--replicates",
        "2",
        "--vary",
        "init",
        "order",
        "--trainer.limit_val_batches=2",
    ]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "AugmentedDropout beat without in" in told
    assert Path("studies/compare_AugmentedDropout/report.html").is_file()
    stored = yaml.safe_load(Path("studies/compare_AugmentedDropout/study.yaml").read_text())
    assert stored["pipelines"]["without"]["overrides"] == ["--trainer.limit_val_batches=2"]


def test_compare_without_a_callback(home, capsys, monkeypatch):
    monkeypatch.setattr(Study, "resume", lambda self, tell: self.analyse())
    content = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": [{"class_path": "AugmentedDropout"}]}}
    Path("base.yaml").write_text(yaml.safe_dump(content))
    command = ["compare", "--config", "base.yaml", "--replicates", "2", "--vary", "init"]
    assert main([*command, "--with", "AugmentedDropout"]) == 2
    assert "has AugmentedDropout already; `--without AugmentedDropout`" in capsys.readouterr().err
    assert main([*command, "--without", "DeepKNN"]) == 2
    assert "no callback 'DeepKNN'. There are: 'AugmentedDropout'" in capsys.readouterr().err
    assert main([*command, "--without", "AugmentedDropout"]) == 0
    assert "6 runs of AugmentedDropout, without" in capsys.readouterr().out
    stored = yaml.safe_load(Path("studies/compare_AugmentedDropout/study.yaml").read_text())
    assert stored["pipelines"]["without"]["overrides"] == ["--trainer.callbacks=[]"]
    assert main(command) == 2


def changed_config(**changed: object) -> None:
    Path("base.yaml").write_text(yaml.safe_dump({**CONFIG, **changed}))


@pytest.mark.parametrize(
    ("study", "says"),
    [
        ({"pipelines": {"A": {"config": "base.yaml"}, "B": {"config": ["base.yaml"]}}}, "A and B are the same"),
        ({"pipelines": {"A": {"config": "nothing.yaml"}}}, "nothing.yaml cannot be read"),
        ({"pipelines": {"A": {"config": "base.yaml", "overrides": {"trainer.max_epochz": 3}}}}, "max_epochz"),
        ({"pipelines": {"A": {"config": "base.yaml", "cli": "json:dumps"}}}, "is no LightningCLI"),
        ({"sources": {"config_keys": {"split": "data.init_args.sed"}}}, "has no 'data.init_args.sed'"),
        ({"test": {"reference": "witout"}}, "Did you mean 'without'"),
    ],
)
def test_studies_that_cannot_be_run(home, capsys, study, says):
    assert main(["study", "run", write(home, **study)]) == 2
    assert says in capsys.readouterr().err


def test_metrics_that_are_not_measured(home):
    study = Study("m", metric="train/loss", replicates=2, folder="m", check_repeat=False, engine={"retries": 0})
    study.add("A", config="base.yaml").run()
    says = "'train/loss' is measured in training, not by validate. Did you mean 'val/loss'"
    assert all(says in run.error for run in study.ledger.runs().values())


def test_ranks_that_would_start_the_study_again_are_refused(home):
    study = Study("ddp", metric="val/loss", replicates=2, folder="ddp", check_repeat=False, engine={"retries": 0})
    study.add("A", config="base.yaml", overrides={"trainer.devices": 2, "trainer.strategy": "ddp"}).run()
    assert all("ddp_fork" in run.error for run in study.ledger.runs().values())


@pytest.mark.slow
def test_two_processes_in_a_run(home):
    engine = {"retries": 0, "process": "spawn"}  # what other tests did with CUDA in this process is not inherited
    study = Study("ddp", metric="val/loss", replicates=2, folder="ddp", check_repeat=False, engine=engine)
    overrides = {"trainer.devices": 2, "trainer.strategy": "ddp_fork", "trainer.limit_val_batches": 2}
    found = study.add("A", config="base.yaml", overrides=overrides).run()
    assert len(found.scores["A"]) == 2, [run.error for run in study.ledger.runs().values()]


def test_what_pairs_do_not_share_is_told(home):
    larger = {"config": "base.yaml", "overrides": {"data.init_args.batch_size": 16}}
    file = write(home, pipelines={"large": {"config": "base.yaml"}, "small": larger})
    found = Study.from_yaml(file, check_repeat=False).run()
    assert any("they are not paired in these" in n and "order" in n for n in found.notices)


def test_the_own_cli_of_a_user(home):
    code = "from lightning.pytorch.cli import LightningCLI\nclass Own(LightningCLI):\n"
    code += "    def add_arguments_to_parser(self, parser):\n        parser.add_argument('--own', default=1)\n"
    Path("owncli.py").write_text(code)
    pipeline = {"config": "base.yaml", "cli": "owncli.py:Own", "overrides": ["--own=2"]}
    study = Study("own", metric="val/accuracy", replicates=2, folder="own", check_repeat=False)
    study.add("A", **pipeline)
    assert len(study.run().scores["A"]) == 2
    with pytest.raises(InvalidArgument, match="own"):
        Study("x", metric="x").add("A", config="base.yaml", overrides=["--own=2"]).analyse()
