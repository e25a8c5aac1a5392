"""The distiller against the step written by hand, and everything that the card found to go wrong."""

from __future__ import annotations

import copy
import csv

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_methods.errors import (
    InvalidArgument,
    LayerNotFound,
    ShapeMismatch,
    TensorOverwritten,
    UnsupportedTraining,
)
from lightning_methods.lit import LITDistiller, fingerprint, kd_loss, stitched
from lightning_methods.lit.norms import statistics_kept
from lightning_methods.lit.phases import plan_phases
from tests.lit.conftest import QUIET, dense, distiller, fit, loader, made_data
from tests.support.training import ResumableLoader, same_state

SECTIONS = ("layer1", "layer2")


def by_hand(norm=None, *, beta=0.75, mode="lit", lit_epochs=2, epochs=4, batches=None, reuse=False):
    """Train as the paper says, with nothing of the distiller but its losses' definitions."""
    torch.manual_seed(0)
    teacher, student = dense(3, norm=norm), dense(1, norm=norm)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    teacher.eval()
    if mode not in ("kd", "scratch"):
        student.stem.load_state_dict(teacher.stem.state_dict())
        student.head.load_state_dict(teacher.head.state_dict())
    ends = [student.stem, student.head]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    milestones = [round(lit_epochs * 100 / 175), round((epochs - lit_epochs) * 55 / 125)]
    frozen = mode not in ("kd", "scratch")
    for epoch in range(epochs):
        phase, since = (1, epoch) if epoch < lit_epochs else (2, epoch - lit_epochs)
        if epoch == lit_epochs:
            optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        optimizer.param_groups[0]["lr"] = (0.1 if phase == 1 else 0.01) * (
            0.1 if 0 < milestones[phase - 1] <= since else 1
        )
        student.train()
        if phase == 1 and frozen:
            for end in ends:
                end.eval()
        for x, y in batches or loader():
            with torch.no_grad():
                t0 = teacher.stem(x)
                t1 = teacher.layer1(t0)
                t2 = teacher.layer2(t1)
                taught = teacher.head(t2)
            if mode == "scratch":
                loss = F.cross_entropy(student(x), y)
            else:
                first = student.layer1(student.stem(x))
                second = student.layer2(first)
                loss = kd_loss(student.head(second), taught, y)
                if phase == 1 and mode in ("lit", "fitnets") and beta < 1:
                    fed = [first, second]
                    if mode == "lit":
                        kept = [b.clone() for b in student.buffers()]
                        fed = [student.layer1(t0), student.layer2(t1)]
                        for b, k in zip(student.buffers(), kept, strict=True):
                            b.data.copy_(k)  # past autograd, which has saved it
                    loss = beta * loss + (1 - beta) * (F.mse_loss(fed[0], t1) + F.mse_loss(fed[1], t2))
            optimizer.zero_grad()
            loss.backward()
            if phase == 1 and frozen:
                for p in [p for end in ends for p in end.parameters()]:
                    p.grad = None
            optimizer.step()
    return student


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("mode", ["lit", "kd", "kd_copied_ends", "fitnets", "scratch"])
@pytest.mark.parametrize("reuse", [True, False])
def test_each_mode_equals_the_step_written_by_hand(norm, mode, reuse, tmp_path):
    module = distiller(norm, mode=mode, lit_epochs=2, reuse_first_section=reuse)
    fit(module, tmp_path)
    if mode == "lit":
        assert module._inspected
    assert same_state(module.export_student(), dict(by_hand(norm, mode=mode).state_dict()), 2e-6)


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_shares(beta, tmp_path):
    module = distiller(nn.BatchNorm1d, beta=beta, lit_epochs=2)
    fit(module, tmp_path)
    assert same_state(module.export_student(), dict(by_hand(nn.BatchNorm1d, beta=beta).state_dict()), 2e-6)


class Calls:
    """Counts how often modules of the student run with a graph."""

    def __init__(self, module):
        self.counts = dict.fromkeys(("stem", "layer1", "layer2", "head"), 0)
        for name in self.counts:
            getattr(module.student, name).register_forward_hook(self._count(name))

    def _count(self, name):
        def hook(*_):
            self.counts[name] += torch.is_grad_enabled()

        return hook


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"stem": 1, "layer1": 1, "layer2": 2, "head": 1}),
        ({"reuse_first_section": False}, {"stem": 1, "layer1": 2, "layer2": 2, "head": 1}),
        ({"beta": 1.0}, {"stem": 1, "layer1": 1, "layer2": 1, "head": 1}),
        ({"beta": 0.0}, {"stem": 0, "layer1": 1, "layer2": 1, "head": 0}),
        ({"mode": "fitnets"}, {"stem": 1, "layer1": 1, "layer2": 1, "head": 1}),
        ({"freeze_ends": False}, {"stem": 1, "layer1": 2, "layer2": 2, "head": 1}),
        ({"copy_ends": False}, {"stem": 1, "layer1": 2, "layer2": 2, "head": 1}),
    ],
)
def test_what_runs_in_a_step_of_phase_1(settings, expected, tmp_path):
    module = distiller(nn.BatchNorm1d, lit_epochs=4, **settings)
    calls = Calls(module)
    fit(module, tmp_path, max_epochs=4, limit_val_batches=0)
    steps = 4 * 3
    assert calls.counts == {name: n * steps for name, n in expected.items()}


class Watch(Callback):
    """Keeps the student's state at the end of each epoch."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, module):
        self.states.append({k: v.clone() for k, v in module.student.state_dict().items()})


def ends_of(state):
    return {k: v for k, v in state.items() if not k.startswith("layer")}


def test_ends_stand_still_in_phase_1_and_move_in_phase_2(tmp_path):
    module, watch = distiller(nn.BatchNorm1d, lit_epochs=2), Watch()
    copied = ends_of(module.export_student())
    taught = ends_of(dict(module.teacher.state_dict()))
    assert same_state(copied, taught)
    assert "stem.1.running_mean" in copied
    fit(module, tmp_path, callbacks=[watch])
    assert same_state(ends_of(watch.states[1]), copied)
    after = ends_of(watch.states[3])
    assert all(not torch.equal(after[k], v) for k, v in copied.items())
    assert all(p.requires_grad for p in module.student.parameters())
    assert all(m.training for m in module.student.modules())


def test_a_head_that_cannot_be_copied_is_trained_from_the_start(tmp_path):
    torch.manual_seed(0)
    student = dense(1)
    student.head = nn.Sequential(nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="head.0.weight"):
        module = LITDistiller(dense(3), student, list(SECTIONS), lit_epochs=4)
    before = module.export_student()
    fit(module, tmp_path)
    after = module.export_student()
    assert not torch.equal(before["head.0.weight"], after["head.0.weight"])
    assert torch.equal(before["stem.0.weight"], after["stem.0.weight"])


def test_the_teacher_is_left_alone_whatever_is_called(tmp_path):
    module = distiller(nn.BatchNorm1d, lit_epochs=2)
    before = fingerprint(module.teacher)
    module.teacher.train()
    module.train()

    class Disturb(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            module.train()
            module.teacher.train()

    fit(module, tmp_path, callbacks=[Disturb()])
    assert fingerprint(module.teacher) == before
    assert not any(m.training for m in module.teacher.modules())
    assert all(p.grad is None for p in module.teacher.parameters())
    assert not {id(p) for p in module.parameters()} & {id(p) for p in module.teacher.parameters()}
    assert same_state(module.export_student(), dict(by_hand(nn.BatchNorm1d).state_dict()), 2e-6)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.teacher.modules())


# -- running statistics ------------------------------------------------------------------------------------------------


def test_statistics_do_not_change_the_weights_in_phase_1(tmp_path):
    states = {}
    for kind in ("student", "both", "teacher"):
        module = distiller(nn.BatchNorm1d, lit_epochs=2, bn_stats=kind, reuse_first_section=False)
        fit(module, tmp_path, max_epochs=2, limit_val_batches=0)
        states[kind] = module.export_student()
    for name, value in states["student"].items():
        others = [states[kind][name] for kind in ("both", "teacher")]
        if "running" in name and name.startswith("layer2"):
            assert all(not torch.equal(value, other) for other in others)
        elif "num_batches" in name and name.startswith("layer"):
            assert [int(value), *map(int, others)] == [6, 12, 6]
        elif "running" not in name:
            assert all(torch.equal(value, other) for other in others)


def test_without_the_student_its_statistics_come_from_the_teacher_fed_pass(tmp_path):
    module = distiller(nn.BatchNorm1d, beta=0, lit_epochs=4)
    fit(module, tmp_path)
    assert int(module.student.layer1[1].num_batches_tracked) == 12
    for wrong in ("student", "both"):
        with pytest.raises(InvalidArgument, match="beta=0"):
            distiller(nn.BatchNorm1d, beta=0, bn_stats=wrong)


def test_instance_norm_keeps_its_statistics():
    norm = nn.InstanceNorm1d(3, track_running_stats=True)
    before = copy.deepcopy(norm.state_dict())
    with statistics_kept([norm]):
        norm(torch.randn(4, 3, 5))
    assert same_state(dict(norm.state_dict()), dict(before))
    norm(torch.randn(4, 3, 5))
    assert not same_state(dict(norm.state_dict()), dict(before))


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_a_section_loss_reaches_its_own_section_alone():
    module = distiller(lit_epochs=2)
    module._sections.attach()
    x, _ = next(iter(loader()))
    with module._sections.lesson((x,), {}) as lesson:
        losses = module._sections.fed_losses(lesson)
        names = [name for name, _ in module.student.named_parameters()]
        for section in SECTIONS:
            gradients = torch.autograd.grad(
                losses[section].loss, list(module.student.parameters()), allow_unused=True, retain_graph=True
            )
            reached = {name for name, g in zip(names, gradients, strict=True) if g is not None}
            assert reached == {name for name in names if name.startswith(section)}


@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("reuse", [True, False])
def test_sequential_backward_gives_the_same(norm, reuse, tmp_path):
    states = []
    for early in (False, True):
        module = distiller(norm, lit_epochs=2, sequential_backward=early, reuse_first_section=reuse)
        fit(module, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5)
        states.append(module.export_student())
    assert same_state(*states, 2e-6)


def test_an_identical_student_has_no_section_error():
    torch.manual_seed(0)
    teacher = dense(2, norm=nn.LayerNorm)
    module = LITDistiller(teacher, copy.deepcopy(teacher), list(SECTIONS))
    module._sections.attach()
    with module._sections.lesson((torch.randn(5, 6),), {}) as lesson:
        assert all(float(o.loss) == 0 == float(o.relative) for o in module._sections.fed_losses(lesson).values())


# -- resuming ----------------------------------------------------------------------------------------------------------


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 9, 11])
@pytest.mark.parametrize("adaptive", [False, True])
def test_resumed_equals_uninterrupted(step, adaptive, tmp_path):
    class Resumable(ResumableLoader):
        def __init__(self):
            self.batches = list(DataLoader(made_data(), batch_size=16))
            self.position = self.start = 0

    path = tmp_path / "saved.ckpt"
    settings = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)} if adaptive else {}
    whole = distiller(nn.BatchNorm1d, lit_epochs=2, **settings)
    fit(whole, tmp_path, data=Resumable(), callbacks=[SaveAt(step, path)])
    resumed = distiller(nn.BatchNorm1d, lit_epochs=2, seed=0, **settings)
    trainer = fit(resumed, tmp_path, data=Resumable(), ckpt_path=path)
    assert trainer.global_step == 12
    assert same_state(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_checkpoints_hold_the_student_alone(tmp_path):
    path = tmp_path / "saved.ckpt"
    module = distiller(nn.BatchNorm1d, lit_epochs=2)
    fit(module, tmp_path, callbacks=[SaveAt(12, path)])
    held = torch.load(path, weights_only=True)
    assert set(held["state_dict"]) == {f"student.{k}" for k in module.student.state_dict()}
    alone = LITDistiller.load_from_checkpoint(path, teacher=None, student=dense(1, norm=nn.BatchNorm1d))
    x = torch.randn(4, 6)
    assert torch.equal(alone.eval()(x), module.eval()(x))
    fresh = dense(1, norm=nn.BatchNorm1d)
    fresh.load_state_dict(module.export_student())
    assert torch.equal(fresh.eval()(x), module(x))
    with pytest.raises(InvalidArgument, match="teacher is None"):
        fit(alone, tmp_path)


def test_another_teacher_is_refused_on_resume(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(distiller(lit_epochs=2), tmp_path, callbacks=[SaveAt(5, path)])
    other = distiller(lit_epochs=2, seed=1)
    with pytest.raises(InvalidArgument, match="of the fingerprint"):
        fit(other, tmp_path, ckpt_path=path)


# -- networks of any kind ----------------------------------------------------------------------------------------------


def step_of(teacher, student, sections, x, y=None, **settings):
    """Run one step of phase 1 outside of a Trainer and return the module and its loss."""
    module = LITDistiller(teacher, student, sections, **settings)
    module._sections.attach()
    batch = x if y is None else (x, y)
    loss = module.training_step(batch, 0)
    loss.backward()
    return module, loss


class Residual(nn.Module):
    """Takes a second argument by name and returns a tuple."""

    def __init__(self, width, first=None):
        super().__init__()
        self.first = first or nn.Identity()
        self.linear = nn.Linear(width, width)

    def forward(self, x, *, scale):
        return x + scale * self.linear(self.first(x)), scale


class Named(nn.Module):
    """Two sections with keyword arguments and tuple outputs."""

    def __init__(self, depth):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layer1 = nn.ModuleList([Residual(8) for _ in range(depth)])
        self.a, self.b = Residual(8), Residual(8)
        self.head = nn.Linear(8, 3)
        self.depth = depth

    def forward(self, x):
        h = self.stem(x)
        h, scale = self.a(h, scale=0.5)
        h, _ = self.b(h, scale=scale)
        return self.head(h)


def test_keyword_arguments_and_tuples():
    torch.manual_seed(0)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    teacher, student = Named(2), Named(1)
    _, loss = step_of(teacher, student, ["a", "b"], x, y)
    with torch.no_grad():
        t0 = teacher.stem(x)
        t1 = teacher.a(t0, scale=0.5)[0]
        t2 = teacher.b(t1, scale=0.5)[0]
        ir = F.mse_loss(student.a(t0, scale=0.5)[0], t1) + F.mse_loss(student.b(t1, scale=0.5)[0], t2)
        expected = 0.75 * kd_loss(student(x), teacher(x), y) + 0.25 * ir
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


class Inplace(nn.Module):
    """Every section begins with an activation, in place or not."""

    def __init__(self, inplace, depth):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layer1 = self._section(inplace, depth)
        self.layer2 = self._section(inplace, depth)
        self.tail = nn.LeakyReLU(0.2, inplace=inplace)
        self.head = nn.Linear(8, 3)

    def _section(self, inplace, depth):
        layers = []
        for _ in range(depth):
            layers += [nn.LeakyReLU(0.2, inplace=inplace), nn.Linear(8, 8)]
        return nn.Sequential(*layers)

    def forward(self, x):
        return self.head(self.tail(self.layer2(self.layer1(self.stem(x)))))


@pytest.mark.parametrize("mode", ["lit", "fitnets"])
def test_operations_in_place_change_nothing(mode):
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        module, loss = step_of(Inplace(inplace, 2), Inplace(inplace, 1), list(SECTIONS), x, y, mode=mode)
        results.append((loss.item(), [p.grad for p in module.student.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert same_state(results[0][1], results[1][1], 1e-6)


def test_operations_in_place_without_copies_are_an_error():
    torch.manual_seed(0)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(TensorOverwritten, match="clone_features=True"):
        step_of(Inplace(True, 2), Inplace(True, 1), list(SECTIONS), x, y, clone_features=False)


def test_ranges_of_a_sequential_and_one_dimensional_convolutions():
    torch.manual_seed(0)

    def net(depth):
        body = []
        for _ in range(depth):
            body += [nn.Conv1d(4, 4, 3, padding=1), nn.ReLU()]
        pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)]
        return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), *body, *pool)

    x, y = torch.randn(5, 2, 12), torch.tensor([0, 1, 2, 0, 1])
    module, loss = step_of(net(4), net(1), [("1:9", "1:3")], x, y, copy_ends=False)
    assert module.pairs[0].name == "1:3"
    assert loss.isfinite()


def test_published_networks():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    deep, shallow = models.resnet34(num_classes=10), models.resnet18(num_classes=10)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    module, loss = step_of(deep, shallow, "auto", x, y)
    assert [p.name for p in module.pairs] == ["layer1", "layer2", "layer3", "layer4"]
    assert loss.isfinite()
    assert not [n for n, p in shallow.named_parameters() if p.grad is None]


def test_without_labels_and_with_sections_alone(tmp_path):
    module = distiller(beta=0, lit_epochs=2, finetune_epochs=0)
    x = torch.randn(32, 6)
    fit(module, tmp_path, data=DataLoader(x, batch_size=8), max_epochs=2, limit_val_batches=0)
    module = distiller(alpha=0, lit_epochs=1)
    fit(module, tmp_path, data=DataLoader(x, batch_size=8), max_epochs=2, limit_val_batches=0)
    with pytest.raises(ValueError, match="No targets"):
        fit(distiller(lit_epochs=1), tmp_path, data=DataLoader(x, batch_size=8), max_epochs=2)


@pytest.mark.parametrize("kind", ["conv1x1", "select"])
@pytest.mark.parametrize("mode", ["lit", "fitnets"])
def test_widths_that_differ(kind, mode, tmp_path):
    torch.manual_seed(0)
    settings = {"adapters": kind, "input_shape": [6], "mode": mode, "lit_epochs": 2}
    with pytest.warns(UserWarning, match="keep their own values"):
        module = LITDistiller(dense(3, width=8), dense(1, width=6), list(SECTIONS), **settings)
    assert bool(list(module.adapters.parameters())) is (kind == "conv1x1")
    before = [p.clone() for p in module.adapters.parameters()]
    fit(module, tmp_path)
    assert all(not torch.equal(a, b) for a, b in zip(before, module.adapters.parameters(), strict=True))
    assert not [name for name in module.export_student() if "adapter" in name]


def test_compiled_networks(tmp_path):
    torch._dynamo.reset()
    states = []
    for form in ("plain", "assigned", "in place", "whole teacher"):
        module = distiller(nn.BatchNorm1d, lit_epochs=2) if form != "whole teacher" else None
        if form == "whole teacher":
            torch.manual_seed(0)
            plain = distiller(nn.BatchNorm1d)
            student = dense(1, norm=nn.BatchNorm1d)
            student.load_state_dict(plain.export_student())
            compiled = torch.compile(plain.teacher, backend="aot_eager")
            module = LITDistiller(compiled, student, list(SECTIONS), lit_epochs=2)
        for network in (module.teacher, module.student):
            for name in SECTIONS:
                if form == "assigned":
                    section = torch.compile(getattr(network, name), backend="aot_eager")
                    setattr(network, name, section)
                elif form == "in place":
                    getattr(network, name).compile(backend="aot_eager")
        if form == "assigned":
            module = LITDistiller(module.teacher, module.student, list(SECTIONS), lit_epochs=2)
        fit(module, tmp_path, limit_val_batches=0)
        states.append(module.export_student())
    for state in states[1:]:
        assert same_state(state, states[0], 1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision, tmp_path):
    module = distiller(nn.BatchNorm1d, lit_epochs=2)
    trainer = fit(module, tmp_path, precision=precision)
    assert all(torch.isfinite(v) for v in trainer.callback_metrics.values())
    assert same_state(ends_of(module.export_student())["stem.0.weight"].shape, (8, 6))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"sections": ["layer3"]}, LayerNotFound, "Did you mean 'layer"),
        ({"sections": ["layer1", "layer1.0"]}, InvalidArgument, "share modules"),
        ({"sections": ["layer1", "layer1"]}, InvalidArgument, "share modules"),
        ({"sections": []}, InvalidArgument, "no section"),
        ({"sections": [("layer1", "layer2", "head")]}, InvalidArgument, "name in the teacher"),
        ({"sections": ["layer1.0:9"]}, InvalidArgument, "nn.Sequential"),
        ({"sections": ["head.0:1"]}, InvalidArgument, "nn.Sequential"),
        ({"sections": "all"}, InvalidArgument, "auto"),
        ({"mode": "kdd"}, InvalidArgument, "Did you mean 'kd'"),
        ({"alpha": -0.1}, InvalidArgument, "alpha"),
        ({"beta": 1.1}, InvalidArgument, "beta"),
        ({"beta": 0, "mode": "kd"}, InvalidArgument, "mode='kd'"),
        ({"temperature": -1}, InvalidArgument, "temperature"),
        ({"section_weights": [1.0]}, InvalidArgument, "1 section_weights for 2"),
        ({"section_weights": [1.0, -1.0]}, InvalidArgument, "at least 0"),
        ({"section_loss": "mses"}, InvalidArgument, "Did you mean 'mse'"),
        ({"adapters": "conv1x1"}, InvalidArgument, "input_shape"),
        ({"adapters": "conv3x3", "input_shape": [6]}, InvalidArgument, "conv1x1"),
        ({"finetune_lr": 0}, InvalidArgument, "finetune_lr"),
        ({"loss_scale": float("inf")}, InvalidArgument, "loss_scale"),
        ({"clone_features": "no"}, InvalidArgument, "clone_features"),
        ({"mode": "kd_copied_ends", "copy_ends": False}, InvalidArgument, "mode='kd'"),
        ({"teacher_ckpt": "nowhere.ckpt"}, InvalidArgument, "no checkpoint"),
    ],
)
def test_settings_that_make_no_sense(settings, error, says):
    with pytest.raises(error, match=says):
        distiller(**settings)


def test_networks_that_do_not_fit():
    x, y = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ShapeMismatch, match="4x8 / 4x6") as caught:
        step_of(dense(3), dense(1, width=6), list(SECTIONS), x, y, copy_ends=False)
    assert "adapters" in str(caught.value)
    with pytest.raises(ShapeMismatch, match="beta=0"):
        step_of(dense(3), dense(1, classes=4), list(SECTIONS), x, y, copy_ends=False)
    with pytest.raises(UnsupportedTraining, match=r"order \['layer1', 'layer2'\]"):
        step_of(dense(3), dense(1), ["layer2", "layer1"], x, y)
    teacher = dense(3)
    teacher.layer2 = teacher.layer1
    with pytest.raises(UnsupportedTraining, match="ran 2 times"):
        step_of(teacher, dense(1), ["layer1"], x, y)
    broken = dense(3)
    nn.init.constant_(broken.layer1[0].bias, float("nan"))
    with pytest.raises(InvalidArgument, match="'layer1' of the teacher gives NaN"):
        step_of(broken, dense(1), list(SECTIONS), x, y)
    same = dense(1)
    with pytest.raises(InvalidArgument, match="share parameters"):
        LITDistiller(same, same, list(SECTIONS))
    with pytest.raises(LayerNotFound, match="different numbers"):
        LITDistiller(dense(1), dense(1))


def test_epochs_that_do_not_add_up():
    with pytest.warns(UserWarning, match="phase 2 is cut short"):
        plan_phases(3, 3, 4)
    with pytest.warns(UserWarning, match="phase 1 is cut short"):
        plan_phases(8, 0, 4)
    with pytest.raises(InvalidArgument, match="lit_epochs=-1"):
        plan_phases(-1, None, 4)
    with pytest.raises(InvalidArgument, match="max_epochs"):
        plan_phases(None, None, -1)
    assert plan_phases(5, None, -1).phase_of(10**6) == 2


def test_manual_optimisation_is_refused(tmp_path):
    module = distiller()
    module.automatic_optimization = False
    with pytest.raises(UnsupportedTraining):
        fit(module, tmp_path)


def test_dict_batches(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return {"x": torch.randn(6), "label": i % 3}

    fit(distiller(lit_epochs=1), tmp_path, data=DataLoader(Rows(), batch_size=4), max_epochs=2, limit_val_batches=0)
    module = distiller(lit_epochs=1, inputs=lambda b: {"input": b["x"]}, targets="label")
    fit(module, tmp_path, data=DataLoader(Rows(), batch_size=4), max_epochs=2, limit_val_batches=0)
    shares = module.predict_step({"x": torch.randn(2, 6)}, 0)
    assert torch.allclose(shares.sum(1), torch.ones(2))


# -- after training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_the_test_loop_and_validation_alone(inplace, tmp_path):
    torch.manual_seed(0)
    module = LITDistiller(Inplace(inplace, 2), Inplace(inplace, 1), list(SECTIONS), lit_epochs=1)
    trainer = fit(module, tmp_path, max_epochs=2)
    (after,) = trainer.test(module, loader(16), verbose=False)
    (again,) = Trainer(**QUIET, default_root_dir=tmp_path).validate(module, loader(16), verbose=False)
    assert after["test/accuracy"] == again["val/accuracy"]
    x, _ = next(iter(loader()))
    with torch.no_grad():
        teacher, student = module.teacher, module.student.eval()
        t0 = teacher.stem(x[:16])
        t1 = teacher.layer1(t0.clone())
        expected = F.mse_loss(student.layer1(t0.clone()), t1) / t1.square().mean()
    one = DataLoader([(x[:16], torch.zeros(16, dtype=torch.long))], batch_size=None)
    (batch,) = trainer.validate(module, one, verbose=False)
    assert batch["lit/teacher_fed/layer1"] == pytest.approx(float(expected), rel=1e-5)


def test_section_errors_fall(tmp_path):
    module = distiller(beta=0, lit_epochs=30)
    fit(module, tmp_path, max_epochs=30, limit_val_batches=0)
    for _, values in module.history.lines("lit/ir/").values():
        assert values[-1] < 0.5 * values[0]


def test_what_is_kept_of_both_phases(tmp_path):
    module = distiller(lit_epochs=2)
    fit(module, tmp_path)
    assert {len(epochs) for epochs, _ in module.history.lines("lit/ir").values()} == {2}
    assert module.history.lines("lit/")["phase"] == ([0, 1, 2, 3], [1, 1, 2, 2])
    for name in ("section_errors", "drift"):
        assert (tmp_path / "lit" / f"{name}_12.png").exists()
    rows = list(csv.DictReader((tmp_path / "lit" / "networks_12.csv").open()))
    counts = [sum(p.numel() for p in net.parameters()) for net in (module.teacher, module.student)]
    assert [int(row["parameters"]) for row in rows] == counts
    assert [int(row["macs"]) for row in rows] == [6 * 8 + 6 * 64 + 24, 6 * 8 + 2 * 64 + 24]
    assert [int(row["depth"]) for row in rows] == [8, 4]
    assert float(rows[1]["compression"]) == pytest.approx(counts[0] / counts[1])


def test_mixtures_of_both_networks(tmp_path):
    module = distiller(nn.BatchNorm1d, lit_epochs=2, stitch=True)
    fit(module, tmp_path, max_epochs=2)
    rows = list(csv.DictReader((tmp_path / "lit" / "stitching_6.csv").open()))
    assert {row["student_sections"] for row in rows} == {"none", "layer1", "layer2", "layer1 layer2"}
    x, y = next(iter(loader(16)))
    before = fingerprint(module.teacher)
    for row in rows:
        names = [] if row["student_sections"] == "none" else row["student_sections"].split()
        hybrid = stitched(module.teacher, module.pairs, names).eval()
        with torch.no_grad():
            accuracy = (hybrid(x).argmax(1) == y).float().mean().item()
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=1e-6)
        assert int(row["parameters"]) == sum(p.numel() for p in hybrid.parameters())
    assert fingerprint(module.teacher) == before
    with torch.no_grad():
        whole = stitched(module.teacher, module.pairs, list(SECTIONS)).eval()
        assert torch.equal(whole(x), module.student.eval()(x))  # the ends are the teacher's still
    with pytest.raises(InvalidArgument, match="layer9"):
        stitched(module.teacher, module.pairs, ["layer9"])
    with pytest.raises(InvalidArgument, match="one width"):
        distiller(stitch=True, adapters="conv1x1", input_shape=[6])
