"""The callback beside what the contract covers: settings, other methods, networks inside of a module."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from lightning_methods.errors import InvalidArgument, LayerNotFound, TensorOverwritten
from lightning_methods.lit import LITDistillation
from lightning_methods.models import Classifier
from lightning_methods.snnl import SoftNearestNeighborLoss
from tests.lit.conftest import dense, distiller, fit, loader
from tests.support.training import same_state

SECTIONS = ["layer1", "layer2"]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def networks(norm=None):
    module = distiller(norm)
    return module.teacher, module.student


@pytest.mark.parametrize("mode", ["lit", "kd", "kd_copied_ends", "fitnets"])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d])
def test_the_callback_equals_the_module(mode, norm, tmp_path):
    def level(optimizer):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    module = distiller(
        norm, mode=mode, lit_epochs=2, optimizer=sgd, scheduler=level, finetune_lr=0.1, finetune_scheduler=level
    )
    exactly = {"precision": "64-true"}  # batch norm makes much of the last digit
    fit(module, tmp_path, **exactly)
    torch.manual_seed(0)
    teacher, student = dense(3, norm=norm), dense(1, norm=norm)
    teacher.load_state_dict(module.teacher.state_dict())
    classifier = Classifier(student, sgd, num_classes=3)
    fit(classifier, tmp_path, callbacks=[LITDistillation(teacher, SECTIONS, mode=mode, lit_epochs=2)], **exactly)
    assert same_state(dict(classifier.net.state_dict()), module.export_student(), 1e-9)
    assert not [m for m in (*teacher.modules(), *student.modules()) if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("first", [True, False])
def test_another_method_does_not_see_the_sections_run_again(first, tmp_path):
    states = []
    for flipped in (False, True):
        teacher, student = networks()
        ours = LITDistillation(teacher, SECTIONS, lit_epochs=3)
        other = SoftNearestNeighborLoss(["net.layer1", "net.layer2"])
        callbacks = [other, ours] if flipped is first else [ours, other]
        classifier = Classifier(student, sgd, num_classes=3)
        trainer = fit(classifier, tmp_path, callbacks=callbacks)
        assert torch.isfinite(trainer.callback_metrics["snnl/total_loss"])
        states.append(dict(classifier.state_dict()))
    assert same_state(*states, 1e-6)


def test_what_is_shown(tmp_path):
    teacher, student = networks()
    classifier = Classifier(student, sgd, num_classes=3)
    trainer = fit(classifier, tmp_path, callbacks=[LITDistillation(teacher, SECTIONS, lit_epochs=4)])
    shown = trainer.callback_metrics
    assert shown["lit/ir"] == pytest.approx(float(shown["lit/ir/layer1"] + shown["lit/ir/layer2"]), rel=1e-5)
    assert shown["lit/phase"] == 1
    rows = list(csv.DictReader((tmp_path / "lit" / "networks_12.csv").open()))
    assert [int(row["depth"]) for row in rows] == [8, 4]
    assert (tmp_path / "lit" / "section_errors_12.png").exists()


def test_settings_that_make_no_sense(tmp_path):
    teacher, student = networks()
    for settings, says in (
        ({"mode": "scratch"}, "without the callback"),
        ({"beta": 2}, "beta"),
        ({"clone_features": 3}, "clone_features"),
        ({"teacher_ckpt": "nowhere.ckpt"}, "no checkpoint"),
    ):
        with pytest.raises(InvalidArgument, match=says):
            LITDistillation(teacher, SECTIONS, **settings)
    classifier = Classifier(student, sgd, num_classes=3)
    with pytest.raises(LayerNotFound, match="Did you mean 'net"):
        fit(classifier, tmp_path, callbacks=[LITDistillation(teacher, SECTIONS, student="nets")])
    two = [LITDistillation(teacher, SECTIONS, log_prefix=p) for p in ("a", "b")]
    with pytest.raises(InvalidArgument, match="Two LITDistillation"):
        fit(classifier, tmp_path, callbacks=two)
    with pytest.raises(InvalidArgument, match="share parameters"):
        fit(Classifier(teacher, sgd, num_classes=3), tmp_path, callbacks=[LITDistillation(teacher, SECTIONS)])
    assert "training_step" not in vars(classifier)


def test_logits_that_are_overwritten(tmp_path):
    class Scales(Classifier):
        def forward(self, x):
            return self.net(x).mul_(2)

    teacher, student = networks()
    with pytest.raises(TensorOverwritten, match="'net'"):
        fit(Scales(student, sgd, num_classes=3), tmp_path, callbacks=[LITDistillation(teacher, SECTIONS)])


def test_another_teacher_is_refused_on_resume(tmp_path):
    teacher, student = networks()
    classifier = Classifier(student, sgd, num_classes=3)
    trainer = fit(classifier, tmp_path, callbacks=[LITDistillation(teacher, SECTIONS)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    held = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert not [key for key in held["state_dict"] if "teacher" in key]
    other = LITDistillation(dense(3), SECTIONS)
    with pytest.raises(InvalidArgument, match="fingerprint"):
        fit(Classifier(dense(1), sgd, num_classes=3), tmp_path, callbacks=[other], ckpt_path=tmp_path / "saved.ckpt")


def test_a_second_fit_begins_anew(tmp_path):
    teacher, student = networks()
    classifier, ours = Classifier(student, sgd, num_classes=3), LITDistillation(teacher, SECTIONS, lit_epochs=1)
    for _ in range(2):
        fit(classifier, tmp_path, callbacks=[ours], max_epochs=2, data=loader())
        assert ours.history.lines("lit/")["phase"] == ([0, 1], [1, 2])
