from __future__ import annotations

import pytest

from lightning_methods.cli import doctor, main


@pytest.fixture
def versions(monkeypatch, tmp_path):
    """Pretend that these versions are installed, with their packages in an empty folder."""
    found = {"torch": "2.15.0", "torchvision": "0.29.2", "lightning": "2.6.6", "pytorch-lightning": "2.6.6"}
    monkeypatch.setattr(doctor, "_version", found.get)
    monkeypatch.setattr(doctor, "_folder", lambda name: tmp_path / name)
    return found


def statuses(check):
    return [finding.status for finding in check()]


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_releases_fail(versions, version):
    versions["lightning"] = version
    finding = next(iter(doctor.lightning()))
    assert finding.status == "fail"
    assert "malicious" in finding.text
    assert "replace every token" in finding.fix


def test_traces_of_the_malicious_release_fail_whatever_the_version_says(versions, tmp_path):
    (tmp_path / "pytorch-lightning/_runtime").mkdir(parents=True)
    (tmp_path / "pytorch-lightning/_runtime/router_runtime.js").write_text("")
    assert statuses(doctor.lightning) == ["ok", "fail", "ok"]


def test_old_lightning_fails_and_two_different_families_warn(versions):
    assert statuses(doctor.lightning) == ["ok", "ok", "ok"]
    versions["pytorch-lightning"] = "2.5.1"
    assert statuses(doctor.lightning) == ["ok", "fail", "warn"]
    versions["pytorch-lightning"] = None
    assert statuses(doctor.lightning) == ["ok"]


def test_builds_that_do_not_match_fail(versions, tmp_path):
    assert statuses(doctor.torch_and_torchvision) == ["ok"]
    for name, build in {"torch": "cpu", "torchvision": "cu132"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "version.py").write_text(f"__version__ = '1.2.3+{build}'\n")
    (finding,) = doctor.torch_and_torchvision()
    assert finding.status == "fail"
    assert "torch is built for cpu and torchvision for cu132" in finding.text
    assert finding.fix.endswith("pip install --force-reinstall torch torchvision")


def test_a_torch_that_torchvision_does_not_want_fails(versions, monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy", "torch (==2.14.0)"])
    (finding,) = doctor.torch_and_torchvision()
    assert finding.status == "fail"
    assert "torchvision 0.29.2 needs torch==2.14.0, torch 2.15.0 is installed" in finding.text
    versions["torch"] = "2.14.0+cpu"  # the local tag does not matter to the rule
    assert statuses(doctor.torch_and_torchvision) == ["ok"]


def test_missing_and_old_requirements_and_extras(monkeypatch):
    wanted = ["torch<3,>=2.6", "rich>=13", "wandb>=0.19; extra == 'wandb'", "torch-geometric>=2.6; extra == 'graph'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "_version", {"torch": "2.5.0+cpu", "wandb": "0.31.0"}.get)
    assert statuses(doctor.requirements) == ["fail", "fail"]
    extras = {finding.text.split()[1]: finding for finding in doctor.extras()}
    assert extras["graph"].status == "warn"
    assert extras["graph"].fix == "pip install 'lightning-methods[graph]'"
    assert extras["wandb:"].status == "ok"


@pytest.mark.parametrize(
    ("mode", "key", "status"),
    [("offline", "", "ok"), ("disabled", "", "warn"), ("online", "", "warn"), ("online", "k" * 40, "ok")],
)
def test_wandb_mode(monkeypatch, tmp_path, mode, key, status):
    monkeypatch.setattr(doctor, "_version", lambda name: "0.31.0")
    for name, value in {"WANDB_MODE": mode, "WANDB_API_KEY": key, "HOME": str(tmp_path), "NETRC": ""}.items():
        monkeypatch.setenv(name, value)
    (finding,) = doctor.wandb()
    assert finding.status == status
    assert "kkk" not in finding.text + finding.fix


def test_a_key_in_netrc_counts_for_its_host_only(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    for name, value in {"WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    assert not doctor._logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/api")
    assert doctor._logged_in()


def test_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (finding,) = doctor.compiler()
    assert finding.status == "warn"
    assert "install g++" in finding.fix


def test_a_check_that_breaks_does_not_silence_the_others(monkeypatch, capsys):
    def broken():
        yield doctor.Finding("ok", "first")
        raise OSError("odd disk")

    def fails():
        yield doctor.Finding("fail", "last", "mend it")

    monkeypatch.setattr(doctor, "CHECKS", (broken, fails))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "warn  the check of broken could not be finished: OSError: odd disk" in shown
    assert "fail  last\n      -> mend it" in shown


def test_healthy_processes_make_a_healthy_report(monkeypatch, capsys):
    answer = '{"version": "2.15.0", "gloo": true, "nccl": true, "built": "13.2", "devices": ["H200"]}'
    probes = {"torch": f"print({answer!r})", "torchvision": "print('{}')", "lightning": "print('{}')"}
    monkeypatch.setattr(doctor, "_PROBES", probes)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.imports,))
    assert main(["doctor"]) == 0
    assert "CUDA 13.2: H200" in capsys.readouterr().out


def test_a_probe_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBES", {"torch": "import time; time.sleep(60)"})
    monkeypatch.setattr(doctor, "_PATIENCE", 0.2)
    (finding,) = doctor.imports()
    assert finding.status == "fail"
    assert "took more than" in finding.text


@pytest.mark.slow
def test_this_installation_is_healthy(capsys):
    assert main(["doctor"]) == 0, capsys.readouterr().out
