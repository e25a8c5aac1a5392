"""Studies of functions: what is run, what is concluded, what is refused, and the engines."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from lightning_methods import Study
from lightning_methods.errors import InvalidArgument, MissingDependency
from lightning_methods.reproducibility.content import content_of
from lightning_methods.reproducibility.report import findings, markdown, page
from lightning_methods.reproducibility.settings import flat_options
from tests.reproducibility import pipelines

HERE = "tests.reproducibility.pipelines"


def made(folder: Path, *functions: str, **settings: object) -> Study:
    # reused processes: what is tested here is not the fork
    engine = {"retries": 0, "process": "reuse", **settings.pop("engine", {})}  # type: ignore[dict-item]
    base = {"metric": "score", "vary": ["init", "split"], "replicates": 8, "folder": folder, "check_repeat": False}
    study = Study("made", **{**base, **settings}, engine=engine)  # type: ignore[arg-type]
    for name in functions or ("better", "plain"):
        study.add(name, getattr(pipelines, name))
    return study


# -- what is concluded -------------------------------------------------------------------------------------------------


def test_pairs_share_their_seeds_and_give_a_verdict(tmp_path):
    found = made(tmp_path, replicates=29, check_repeat=True).run()
    assert found.decision == "significant and meaningful"
    assert found.verdict.correlation > 0.9
    assert found.verdict.unpaired_probability < found.verdict.probability
    sentence = found.comparisons[0].sentence("score")
    assert re.match(r"better beat plain in 2\d of 29 paired runs on score; P\(better>plain\) = [01]\.\d\d", sentence)
    assert found.comparisons[0].difference.estimate == pytest.approx(0.3, abs=0.05)
    assert not found.problems
    assert not found.stale


def test_lower_is_better(tmp_path):
    found = made(tmp_path, mode="min", replicates=10).run()
    assert found.verdict.probability < 0.2
    assert found.comparisons[0].power.needed is None
    assert "did not do better" in found.comparisons[0].advice()


def test_enlarging_adds_rows_only_and_a_changed_pipeline_is_a_new_one(tmp_path):
    small = made(tmp_path, replicates=4)
    before = small.run()
    first = small.ledger.runs()
    large = made(tmp_path, replicates=7)
    after = large.run()
    assert {k: v for k, v in after.scores["plain"].items() if k[1] < 4} == before.scores["plain"]
    assert len(large.ledger.runs()) == 14
    assert all(large.ledger.runs()[i] == run for i, run in first.items())
    changed = made(tmp_path, "plain", replicates=4)
    changed.add("better", pipelines.slow)
    found = changed.run()
    assert [(name, count) for name, _, count in found.stale] == [("better", 7)]


def test_one_at_a_time_tells_a_source_without_effect(tmp_path):
    found = made(tmp_path, "plain", vary=["init", "split", "dropout"], design="one_at_a_time", replicates=12).run()
    components = found.components["plain"]
    assert components["split"].std > 4 * components["init"].std > 0
    assert components["init"].share == pytest.approx(components["init"].std / components["split"].std)
    assert any("'dropout' has no effect" in p and "12 runs" in p for p in found.problems)
    two = made(tmp_path, design="one_at_a_time", replicates=3).run()
    assert two.decision == "incomplete"
    assert "a verdict needs design all or sobol" in two.comparisons[0].incomplete


def test_sobol_shares_its_first_column_with_the_design_of_all(tmp_path):
    made(tmp_path, "plain", replicates=6).run()
    study = made(tmp_path, "plain", replicates=6, design="sobol")
    before = set(study.ledger.runs())
    found = study.run()
    assert len(set(study.ledger.runs()) - before) == 6 * 3  # B and two mixtures
    assert set(found.sobol["plain"]) == {"init", "split"}
    assert len(found.whole("plain")) == 12


def test_a_pipeline_that_is_not_deterministic_is_found(tmp_path):
    found = made(tmp_path, "random_of_its_own", "plain", check_repeat=True, replicates=2).run()
    assert ["random_of_its_own: the pipeline is not deterministic" in p for p in found.problems] == [True]


def test_examples_give_a_two_way_interval(tmp_path):
    study = made(tmp_path, "examples_right", replicates=6)
    study.add("again", lambda seeds: pipelines.examples_right({**seeds, "init": seeds["init"] + 1}))
    found = study.run().comparisons[0]
    assert set(found.examples) == {"runs", "examples", "both"}
    assert found.examples["both"].low <= found.examples["runs"].estimate <= found.examples["both"].high


def test_several_pipelines_share_the_level(tmp_path):
    study = made(tmp_path, "better", "slow", replicates=6)
    study.add("plain", pipelines.plain)
    with pytest.raises(InvalidArgument, match="no pipeline"):
        Study("x", metric="score", folder=tmp_path, reference="plan").add("plain", pipelines.plain).analyse()
    found = study.run()
    assert [c.verdict.alpha for c in found.comparisons] == [0.025, 0.025]
    assert "better" in found.best
    assert found.ranking.rank_probability.shape == (3, 3)


def test_another_code_or_value_is_another_pipeline(tmp_path):
    def study(function):
        return Study("code", metric="score", replicates=2, folder=tmp_path).add("A", function)

    def hashed(function):
        found = study(function)
        return next(iter(found.hashes.values())) if found.prepared else ""

    def shifted(amount):
        return lambda seeds: pipelines.score(seeds, amount)

    assert hashed(shifted(0.1)) == hashed(shifted(0.1))
    assert hashed(shifted(0.1)) != hashed(shifted(0.2))
    assert hashed(pipelines.better) != hashed(pipelines.plain)
    one, two = {}, {}
    exec("def inner(s):\n    return 1.0\ndef outer(s):\n    return inner(s)\n", one)
    exec("def inner(s):\n    return 2.0\ndef outer(s):\n    return inner(s)\n", two)
    assert hashed(one["outer"]) != hashed(two["outer"])  # what it calls has changed


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failure_keeps_its_log_and_leaves_the_verdict_open(tmp_path):
    study = made(tmp_path, "failing", "plain", replicates=12)
    found = study.run()
    failed = [r for r in study.ledger.runs().values() if r.status == "failed"]
    assert failed
    assert found.decision == "incomplete"
    assert f"{len(failed)} of 12 runs of failing failed" in found.comparisons[0].incomplete
    assert f"incomplete: {len(failed)} of 12" in found.comparisons[0].sentence("score")
    assert failed[0].error == "RuntimeError: the loss is not finite"
    assert "the loss is not finite" in Path(failed[0].log).read_text()
    assert any(failed[0].run_id in p for p in found.problems)
    worst = made(tmp_path, "failing", "plain", replicates=12, failed="worst").analyse()
    assert worst.decision != "incomplete"
    assert worst.verdict.losses >= len(failed)
    drop = made(tmp_path, "failing", "plain", replicates=12, failed="drop").analyse()
    assert drop.verdict.runs == 12 - len(failed)
    assert any("left out" in n for n in drop.notices)


def test_retries_and_resume(tmp_path):
    study = made(tmp_path, "failing", replicates=4, engine={"retries": 2})
    study.run()
    failed = [r for r in study.ledger.runs().values() if r.status == "failed"]
    assert {r.attempt for r in failed} <= {3}
    attempts = {r.run_id: r.attempt for r in failed}
    study.resume()
    assert all(study.ledger.runs()[i].attempt == 3 + n for i, n in attempts.items())


@pytest.mark.parametrize(
    ("function", "engine", "error"),
    [
        ("dying", {"process": "fork"}, "was killed by signal 9"),
        ("dying", {"process": "reuse"}, "was killed by signal 9"),
        ("hanging", {"timeout": 0.3, "process": "fork"}, "took longer than 0.3 s"),
        ("hanging", {"timeout": 0.3, "process": "reuse"}, "took longer than 0.3 s"),
    ],
)
def test_processes_that_die_or_hang(tmp_path, function, engine, error):
    study = made(tmp_path, function, replicates=2, engine=engine)
    study.run()
    assert all(error in r.error for r in study.ledger.runs().values())


def test_a_metric_that_is_missing_or_nan(tmp_path):
    study = made(tmp_path, "torch_sum", metric="scor", replicates=2)
    study.run()
    errors = {r.error for r in study.ledger.runs().values()}
    assert errors == {"InvalidArgument: The run gave no metric 'scor'. Did you mean 'score', 'other'?"}
    study = Study("nan", metric="score", replicates=2, folder=tmp_path / "nan", check_repeat=False)
    study.add("A", lambda seeds: float("nan")).run()
    assert all("'score' is nan" in r.error for r in study.ledger.runs().values())


# -- engines -----------------------------------------------------------------------------------------------------------


def scores_of(folder: Path, **engine: object) -> object:
    return made(folder, "torch_sum", replicates=2, engine={"workers": 2, **engine}).run().scores


def test_engines_agree_bit_for_bit(tmp_path):
    assert scores_of(tmp_path / "fork", process="fork") == scores_of(tmp_path / "reuse", process="reuse")


@pytest.mark.slow
def test_a_fresh_interpreter_agrees_bit_for_bit(tmp_path):
    assert scores_of(tmp_path / "spawn", process="spawn") == scores_of(tmp_path / "reuse", process="reuse")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "engine"), [("ray", {"kind": "ray"}), ("submitit", {"kind": "slurm", "options": {"cluster": "local"}})]
)
def test_ray_and_submitit_agree_bit_for_bit_where_they_are_installed(tmp_path, package, engine):
    pytest.importorskip(package)
    assert scores_of(tmp_path / package, **engine) == scores_of(tmp_path / "reuse", process="reuse")


def test_engines_that_are_not_installed_or_cannot_import_a_function(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    for kind, package in (("slurm", "submitit"), ("ray", "ray")):
        with pytest.raises(MissingDependency, match=f"pip install {package}"):
            made(tmp_path, "plain", engine={"kind": kind}).run()
    study = Study("x", metric="score", folder=tmp_path / "x", engine={"process": "spawn"})
    with pytest.raises(InvalidArgument, match="cannot import the function of 'A'"):
        study.add("A", lambda seeds: 1.0).run()


def test_commands_for_any_scheduler(tmp_path, monkeypatch, capsys):
    from lightning_methods.cli import main

    monkeypatch.chdir(tmp_path)
    text = f"study: {{name: made, metric: score, folder: made}}\npipelines:\n  A: {{function: '{HERE}:better'}}\n"
    text += f"  B: {{function: '{HERE}:plain'}}\nsources: {{vary: [init, split], replicates: 2, check_repeat: false}}\n"
    Path("study.yaml").write_text(text + "engine: {kind: commands}\n")
    assert main(["study", "run", "study.yaml"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 4
    for command in commands:
        program, *words = command.split()
        assert program == "lightning-methods"
        assert main(words) == 0
    capsys.readouterr()
    assert main(["study", "run", "study.yaml"]) == 0
    assert capsys.readouterr().out.strip() == ""  # nothing is left
    sweep = Path("made/sweep.yaml").read_text()
    assert "${args}" in sweep
    assert main(["study", "status", "study.yaml"]) == 0
    assert "4 runs: 4 done" in capsys.readouterr().out


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vary": ["init", "ordr"]}, "source of variation='ordr' is not known. Did you mean 'order'"),
        ({"vary": []}, "vary is empty"),
        ({"vary": ["init", "init"]}, "twice"),
        ({"replicates": 1}, "replicates=1"),
        ({"gamma": 0.4}, "gamma=0.4"),
        ({"alpha": 0.6}, "alpha=0.6"),
        ({"design": "grid"}, "design='grid'"),
        ({"mode": "higher"}, "mode='higher'"),
        ({"failed": "ignore"}, "failed='ignore'"),
        ({"engine": {"workers": 0}}, "engine.workers=0"),
        ({"engine": {"kind": "kubernetes"}}, "engine.kind='kubernetes'"),
        ({"engine": {"worker": 2}}, "engine has no 'worker'. Did you mean 'workers'"),
        ({"replicate": 3}, "no argument 'replicate'. Did you mean 'replicates'"),
        ({"config_keys": {"splits": "data.seed"}}, "source of variation='splits'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, says):
    with pytest.raises(InvalidArgument, match=re.escape(says)):
        made(tmp_path, **settings)


def test_pipelines_that_cannot_be(tmp_path):
    study = Study("x", metric="score", folder=tmp_path)
    with pytest.raises(InvalidArgument, match="no pipelines"):
        study.run()
    study.add("A", pipelines.plain)
    with pytest.raises(InvalidArgument, match="'A' already"):
        study.add("A", pipelines.plain)
    with pytest.raises(InvalidArgument, match="one of them"):
        study.add("B")
    with pytest.raises(InvalidArgument, match="cannot be imported"):
        Study("x", metric="score", folder=tmp_path).add("C", target="math:nothing").run()
    study.add("B", pipelines.plain)
    with pytest.raises(InvalidArgument, match="A and B are the same"):
        study.run()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("study: {name: x, metric: y}\nsource: {}\n", "no section 'source'. Did you mean 'sources'"),
        ("study: {name: x}\n", "study.metric is missing"),
        ("study: {name: x, metric: y, mod: max}\n", "study has no 'mod'. Did you mean 'mode'"),
        ("study: [x]\n", "must hold names and values"),
        ("pipelines: {A: {confg: a.yaml}}\nstudy: {name: x, metric: y}\n", "pipelines.A has no 'confg'"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, says):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(InvalidArgument, match=re.escape(says)):
        Study.from_yaml(tmp_path / "study.yaml")


def test_overrides_in_every_form():
    assert flat_options({"model": {"init_args": {"p": 0.0}}, "trainer.callbacks": []}) == (
        "--model.init_args.p=0.0",
        "--trainer.callbacks=[]",
    )
    assert flat_options(["--a=1"]) == ("--a=1",)
    assert flat_options({"data": {"class_path": "x.Y", "init_args": {"n": 1}}}) == (
        "--data={class_path: x.Y, init_args: {n: 1}}",
    )


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_is_whole_and_needs_no_network(tmp_path):
    study = made(tmp_path, replicates=10, check_repeat=True)
    analysis = study.run()
    files = {f.name: f for f in study.report()}
    assert {"report.md", "report.html", "report.json", "runs.csv", "scores.png", "power.png"} <= set(files)
    html = files["report.html"].read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("data:image/png;base64,") == len([f for f in files if f.endswith(".png")])
    for text in (html, files["report.md"].read_text()):
        assert "better beat plain in" in text
        assert "over all combinations of runs, unpaired" in text
        assert "\\begin{tabular}" in text
        assert "Not varied: order, augment, dropout" in text
        assert "the first run, made twice, is the same" in text
    told = json.loads(files["report.json"].read_text())
    assert told["decision"] == analysis.decision
    assert told["comparisons"][0]["verdict"]["runs"] == 10
    assert len(files["runs.csv"].read_text().splitlines()) == 1 + 22


def test_markdown_of_a_fixed_ledger(tmp_path):
    study = Study("golden", metric="score", vary=["init"], replicates=6, folder=tmp_path, check_repeat=False)
    ids = study.add("A", pipelines.better).add("B", pipelines.plain).enter()
    for i, run_id in enumerate(ids):
        run = study.ledger.claim([run_id], owner="test")
        study.ledger.finish(run_id, run.attempt, {"metrics": {"score": float(i % 2 == 0) + i}, "seconds": 1.0})
    text = markdown(content_of(study.analyse(), []))
    told = "**A and B tie in all 6 paired runs on score: no difference measured.**"
    assert text.startswith(f"# Study: golden\n\n{told}\n\n## Verdict\n")
    assert "| A | 6 | 6.0000 | 3.7417 | 6.0000 [3.0000, 9.0000] | 1.0000 to 11.0000 |" in text
    assert "Wins, ties, losses: 0, 6, 0." in text


def test_what_came_from_outside_is_escaped(tmp_path):
    study = Study("<b>x</b>", metric="a&b", vary=["init"], replicates=2, folder=tmp_path, check_repeat=False)
    study.add("<script>", pipelines.better).add("B", pipelines.plain).run()
    html = page(content_of(study.analyse(), []), {})
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "a\\&b" in markdown(content_of(study.analyse(), []))
    json.dumps(findings(study.analyse()))


def test_a_report_of_an_empty_ledger(tmp_path):
    study = made(tmp_path)
    text = markdown(content_of(study.analyse(), []))
    assert "have no pair of finished runs yet" in text
    assert study.report()


def test_reading_a_report_does_not_disturb_a_study_that_runs(tmp_path):
    pid = os.fork()
    if pid == 0:
        try:
            made(tmp_path, "slow", replicates=6).run()
        finally:
            os._exit(0)
    study, seen = made(tmp_path, "slow", replicates=6), set()
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        seen.add(len(study.analyse().scores["slow"]))
    assert len(study.analyse().scores["slow"]) == 6
    assert len(seen) > 2
    assert {r.attempt for r in study.ledger.runs().values()} == {1}
