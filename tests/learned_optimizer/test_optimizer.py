"""The optimizer: the same numbers in every form, everything a Trainer asks of an optimizer, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

from lightning_methods import LearnedOptimizer
from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, NotFinite, UnsupportedTraining
from lightning_methods.learned_optimizer import Architecture, available_weights, weights_card
from lightning_methods.learned_optimizer.fast import Engine
from lightning_methods.learned_optimizer.guard import Guard
from lightning_methods.learned_optimizer.unrolled import UnrolledOptimizer
from lightning_methods.learned_optimizer.weights import Weights, load_weights, save_weights
from tests.learned_optimizer import oracle
from tests.support.training import loader

SHAPES = [(3,), (), (200, 100), (4, 3, 3, 3), (1,), (9000,), (0,), (5, 2), (20, 300)]


def made_weights(clock=None, width=None, **settings) -> Weights:
    a = Architecture(**{"step_mult": 1e-2, **settings})
    return Weights("made", a, a.initial(torch.Generator().manual_seed(1)), {"clock": clock, "width": width})


def made_params(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(2)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_gradients(params, t, scale=1.0):
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def run(params, steps=3, scale=1.0, **settings):
    optimizer = LearnedOptimizer(params, **{"weights": made_weights(), **settings})
    for t in range(steps):
        give_gradients(params, t, scale)
        optimizer.step()
    return optimizer


def in_layouts(params):
    """Return the parameters, one channels-last, one transposed, and one with gaps in memory."""
    changed = list(params)
    changed[3] = nn.Parameter(params[3].detach().to(memory_format=torch.channels_last))
    changed[2] = nn.Parameter(params[2].detach().T.contiguous().T)
    gaps = params[8].new_zeros(20, 600)[:, ::2]
    changed[8] = nn.Parameter(gaps.copy_(params[8].detach()))
    return changed


def difference(a, b):
    return max(
        (float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()), default=0
    )


@pytest.mark.parametrize(("zero", "wanted"), [(False, oracle.AFTER_3), (True, oracle.AFTER_2_ZEROS)])
def test_the_public_oracle(zero, wanted):
    params = [nn.Parameter(torch.tensor(p).view(s)) for p, s in zip(oracle.START, oracle.SHAPES, strict=True)]
    optimizer = LearnedOptimizer(params, weights=oracle.weights())
    for t in range(2 if zero else 3):
        for i, p in enumerate(params):
            p.grad = torch.from_numpy(oracle.gradient(i, t)).float().view_as(p) * (not zero)
        optimizer.step()
    for p, values in zip(params, wanted, strict=True):
        assert p.flatten().tolist() == pytest.approx(values, abs=2e-7)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("features", ["paper", "signal", "small_fc"])
def test_the_fast_step_is_the_differentiable_one(features, layers, normalize):
    weights = made_weights(features=features, hidden_layers=layers, normalize_step=normalize, hidden_size=8)
    params = made_params(torch.float64)
    form = UnrolledOptimizer(weights.architecture, SHAPES)
    own, theta = [p.detach().clone()[None] for p in params], weights.theta.double()[None]
    state = form.begin(theta, 1)
    optimizer = LearnedOptimizer(params, weights=weights, guard=False)
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
        own, state = form.step(theta, own, [p.grad[None] for p in params], state, t)
    assert difference(params, [x[0] for x in own]) < 1e-10


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("features", ["paper", "signal", "small_fc"])
@pytest.mark.parametrize(("clock", "width"), [(2, None), (2, 50), (None, 50)])
def test_the_differentiable_step_has_the_guards_limits(monkeypatch, features, normalize, clock, width):
    monkeypatch.setattr("lightning_methods.learned_optimizer.factored.CHUNK", 97)
    monkeypatch.setattr("lightning_methods.learned_optimizer.fast._KEPT_AT_LEAST", 0)  # a part is computed twice
    monkeypatch.setattr(Engine.__init__, "__defaults__", (997,))
    own_settings = {"features": features, "normalize_step": normalize, "hidden_size": 8, "step_mult": 0.3}
    weights = made_weights(clock=clock, width=width, **own_settings)
    params = in_layouts(made_params(torch.float64))
    form = UnrolledOptimizer(weights.architecture, SHAPES, clock, width)
    own, theta = [p.detach().clone()[None] for p in params], weights.theta.double()[None]
    state = form.begin(theta, 1)
    optimizer, largest = LearnedOptimizer(params, weights=weights, max_grad_norm=30.0), 0.0
    for t in range(6):
        before = torch.cat([p.detach().flatten() for p in params])
        give_gradients(params, t)
        optimizer.step()
        clip = 30.0 / torch.cat([p.grad.flatten() for p in params]).norm()
        assert clip < 1
        own, state = form.step(theta, own, [clip * p.grad[None] for p in params], state, t)
        largest = max(largest, float((torch.cat([p.detach().flatten() for p in params]) - before).abs().max()))
    assert largest == pytest.approx(Guard().step_limit)
    assert difference(params, [x[0] for x in own]) < 1e-10


@pytest.mark.parametrize("features", ["paper", "signal", "small_fc"])
@pytest.mark.parametrize("chunk", [97, 5000])
def test_how_it_is_cut_does_not_matter(monkeypatch, features, chunk):
    weights = made_weights(features=features, normalize_step=features == "signal")
    whole, cut = made_params(), made_params()
    run(whole, weights=weights, guard=False)
    monkeypatch.setattr("lightning_methods.learned_optimizer.factored.CHUNK", chunk)
    monkeypatch.setattr("lightning_methods.learned_optimizer.fast._KEPT_AT_LEAST", 0)  # a part is computed twice
    monkeypatch.setattr(Engine.__init__, "__defaults__", (chunk,))
    run(cut, weights=weights, guard=False)
    assert difference(whole, cut) < 2e-6


def test_the_naive_form_gives_the_same_numbers():
    weights = made_weights(step_mult=1e-3)
    ours, naive = made_params(), made_params()
    run(ours, weights=weights)
    parts = weights.architecture.split(weights.theta)
    momenta = [torch.zeros(p.numel(), 6) for p in naive]
    with torch.no_grad():
        for t in range(3):
            give_gradients(naive, t)
            for p, m in zip(naive, momenta, strict=True):
                if p.numel():
                    oracle.naive_step(p, p.grad, m, t, parts)
    assert difference(ours, naive) < 1e-6


def test_layouts():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, 3, 3, generator=generator)
    for make in (
        lambda v: v.to(memory_format=torch.channels_last),
        lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
        lambda v: torch.stack([v, v], -1)[..., 0],  # with gaps
    ):
        plain, other = nn.Parameter(x.clone()), nn.Parameter(make(x.clone()))
        assert not other.is_contiguous()
        one, two = (LearnedOptimizer([p], weights=made_weights()) for p in (plain, other))
        for t in range(3):
            g = torch.randn(x.shape, generator=generator) + t
            plain.grad, other.grad = g, g.to(memory_format=torch.channels_last)
            one.step()
            two.step()
        torch.testing.assert_close(plain, other, rtol=0, atol=1e-6)
        assert torch.allclose(one.state[plain]["momenta"], two.state[other]["momenta"], atol=1e-6)


def test_numbers_whose_squares_leave_float32():
    small, large = made_params(), made_params()
    run(small, scale=1e10, guard=False)
    run(large, scale=1e25, guard=False)
    assert all(bool(p.isfinite().all()) for p in large)
    assert difference(small, large) < 1e-5  # the inputs are normalised


# -- state, groups, schedules ------------------------------------------------------------------------------------------


def test_parameters_without_gradient_wait():
    params = made_params()
    optimizer = run(params, steps=1)
    before = params[0].detach().clone()
    give_gradients(params, 1)
    params[0].grad = None
    params[2].requires_grad_(False)
    params[2].grad = None
    optimizer.step()
    assert torch.equal(params[0], before)
    assert [int(optimizer.state[p]["step"]) for p in params[:3]] == [1, 2, 1]
    assert params[6] not in optimizer.state


def test_groups_learning_rates_and_decay():
    a, b = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = LearnedOptimizer([{"params": [a], "lr": 0.0}, {"params": [b], "weight_decay": 0.1}], lr=0.5)
    c = nn.Parameter(torch.ones(5))
    for p in (a, b):
        p.grad = torch.zeros(5)
    optimizer.step()
    assert torch.equal(a, torch.ones(5))
    assert torch.allclose(b, torch.full((5,), 1 - 0.5 * 0.1))  # nothing but decay without gradients
    optimizer.add_param_group({"params": [c]})
    c.grad = torch.ones(5)
    optimizer.step()
    assert int(optimizer.state[c]["step"]) == 1
    assert int(optimizer.state[a]["step"]) == 2
    with pytest.raises(InvalidArgument, match="lr"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0})
    assert len(optimizer.param_groups) == 3


def test_maximising_is_minimising_the_opposite():
    up, down = made_params(), made_params()
    first = LearnedOptimizer(up, weights=made_weights(), maximize=True)
    second = LearnedOptimizer(down, weights=made_weights())
    for t in range(2):
        give_gradients(up, t)
        give_gradients(down, t)
        for p in down:
            p.grad.neg_()
        first.step()
        second.step()
    assert difference(up, down) == 0


def test_clipping_leaves_the_gradients():
    clipped, by_hand = made_params(), made_params()
    one, two = (
        LearnedOptimizer(p, weights=made_weights(), max_grad_norm=m) for p, m in ((clipped, 0.5), (by_hand, None))
    )
    for t in range(2):
        give_gradients(clipped, t)
        give_gradients(by_hand, t)
        before = clipped[0].grad.clone()
        one.step()
        assert torch.equal(clipped[0].grad, before)
        nn.utils.clip_grad_norm_(by_hand, 0.5)
        two.step()
    assert difference(clipped, by_hand) < 1e-6


def test_schedules_scale_the_step():
    p = nn.Parameter(torch.ones(10))
    optimizer = LearnedOptimizer([p], weights=made_weights(), guard=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t else 1.0)
    moved = []
    for _ in range(2):
        p.grad = torch.ones(10)
        before = p.detach().clone()
        optimizer.step()
        scheduler.step()
        moved.append(float((p - before).abs().max()))
    assert moved[0] > 0
    assert moved[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("clock", [None, 1, 2], ids=["learned", "saved with Adam", "saved before Adam"])
@pytest.mark.parametrize("features", ["paper", "small_fc"])
def test_saved_and_resumed_bit_by_bit(dtype, features, clock):
    weights = made_weights(features=features, clock=clock)
    whole, half = made_params(dtype), made_params(dtype)
    first = run(whole, steps=4, weights=weights)
    run_half = run(half, steps=2, weights=weights)
    file = io.BytesIO()
    torch.save({"optimizer": run_half.state_dict(), "params": [p.detach() for p in half]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p) for p in saved["params"]]
    optimizer = LearnedOptimizer(resumed, weights=weights)
    optimizer.load_state_dict(saved["optimizer"])
    kinds = {k: v.dtype for s in optimizer.state.values() for k, v in s.items()}
    assert set(kinds.values()) == {torch.int64, torch.promote_types(dtype, torch.float32)}
    for t in (2, 3):
        give_gradients(resumed, t)
        optimizer.step()
    assert difference(whole, resumed) == 0
    assert ("second_moment" in optimizer.state[resumed[0]]) == (clock is not None)
    assert optimizer.state_dict()["learned_optimizer"] == first.state_dict()["learned_optimizer"]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(make):
    params = made_params()
    optimizer = run(params)
    other = make((params, optimizer))
    for own, opt in ((params, optimizer), other):
        give_gradients(own, 3)
        opt.step()
    assert difference(params, other[0]) == 0


def test_the_state_of_others():
    params = made_params()
    optimizer = run(params)
    with pytest.raises(InvalidArgument, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.Adam(params).state_dict())
    different = LearnedOptimizer(params, weights=made_weights(step_mult=0.5))
    with pytest.warns(LightningMethodsWarning, match="'made'"):
        different.load_state_dict(optimizer.state_dict())


def test_state_and_memory():
    p = made_params()[2]
    optimizer = run([p])
    assert {k: tuple(v.shape) for k, v in optimizer.state[p].items()} == {"step": (), "momenta": (6, 200, 100)}
    optimizer = run([p], weights=made_weights(features="small_fc"))
    assert sum(v.numel() for v in optimizer.state[p].values()) == 1 + 4 * p.numel() + 3 * (200 + 100)
    assert not any(isinstance(v, torch.Tensor) for v in optimizer.param_groups[0].values())


def test_closures_run_once_with_gradients():
    p, calls = nn.Parameter(torch.ones(3)), []
    optimizer = LearnedOptimizer([p])

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert calls == [True]
    assert p.sum() < 3


def test_bf16_moves_as_float32_does_rounded():
    exact, coarse = made_params(), made_params(torch.bfloat16)
    run(exact)
    run(coarse)
    assert difference(exact, coarse) < 0.05


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite(value):
    def one(policy):
        p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
        optimizer = LearnedOptimizer([p, q], weights=made_weights(), nonfinite=policy)
        p.grad, q.grad = torch.tensor([1.0, value, 2.0, 3.0]), torch.ones(2)
        return p, q, optimizer

    p, q, optimizer = one("skip")
    with pytest.warns(NotFinite):
        optimizer.step()
    optimizer.step()
    assert optimizer.skipped_steps == 2
    assert torch.equal(q, torch.ones(2))
    assert int(optimizer.state[q]["step"]) == 0
    p, q, optimizer = one("zero")
    optimizer.step()
    assert bool(p.isfinite().all())
    assert not torch.equal(q, torch.ones(2))
    assert not bool(p.grad.isfinite().all())
    p, q, optimizer = one("raise")
    with pytest.raises(UnsupportedTraining, match="finite"):
        optimizer.step()
    p, q, optimizer = one("propagate")
    optimizer.step()
    assert not bool(p.isfinite().all())


def test_a_gradient_scaler_skips():
    p = nn.Parameter(torch.ones(4))
    optimizer = LearnedOptimizer([p], weights=made_weights())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, torch.ones(4))
    assert scaler.get_scale() == 2


# -- the guard ---------------------------------------------------------------------------------------------------------


def test_trust_goes_with_the_loss_and_stays():
    guard = Guard()
    for loss in [2.0 + 0.1 * (-1) ** i for i in range(50)] + [0.5] * 300:
        guard.observe(loss)
    assert guard.trust == 1
    for _ in range(60):
        guard.observe(1.4)
    assert 0 < guard.trust < 0.5
    half = guard.trust
    for _ in range(300):
        guard.observe(0.4)
    assert guard.trust == half
    for _ in range(30):
        guard.observe(30.0)
    assert guard.trust == 0
    fresh = Guard()
    for loss in [1.0] * 20 + [math.nan]:
        fresh.observe(loss)
    assert fresh.trust == 0


def test_without_trust_it_is_adam():
    params, adams = made_params(shapes=[(5000,), (7,), (4, 3)]), made_params(shapes=[(5000,), (7,), (4, 3)])
    optimizer = LearnedOptimizer(params, weights=made_weights(), guard_lr=0.01)
    optimizer.guard.trust = 0.0
    adam = torch.optim.Adam(adams, lr=0.01)
    for _ in range(4):
        for own in (params, adams):
            give_gradients(own, 0)  # the same gradient every time: Adam's ratio is one
        optimizer.step()
        adam.step()
    assert difference(params, adams) < 1e-4
    assert "second_moment" in optimizer.state[params[0]]


@pytest.mark.parametrize("features", ["paper", "small_fc"])
def test_half_of_the_trust_is_half_of_the_step(features):
    moved = {}
    for trust in (1.0, 0.5, 0.0):
        params = made_params(shapes=[(5000,), (7,)])
        before = [p.detach().clone() for p in params]
        optimizer = LearnedOptimizer(params, weights=made_weights(features=features))
        optimizer.guard.trust = trust
        give_gradients(params, 0)
        optimizer.step()
        moved[trust] = [p.detach() - b for p, b in zip(params, before, strict=True)]
    mean = [(a + b) / 2 for a, b in zip(moved[1.0], moved[0.0], strict=True)]
    assert difference(mean, moved[0.5]) < 1e-6


def test_time_stands_still_beyond_the_horizon_and_adam_takes_over():
    made = made_weights(step_mult=1e-3)
    weights = Weights("short", made.architecture, made.theta, {"horizon": 4})
    moved = []
    for t in (4, 16):
        p = nn.Parameter(torch.ones(10))
        optimizer = LearnedOptimizer([p], weights=weights)
        optimizer._state_of(p)["step"] += t
        p.grad = torch.ones(10)
        optimizer.step()
        moved.append(1 - p.detach())
    adam = 0.1 / (1 - 0.9**5)  # the momentum has seen one gradient, and time stands at four
    torch.testing.assert_close(moved[1], moved[0] / 4 + 0.75 * 1e-3 * adam, rtol=1e-3, atol=0)


@pytest.mark.parametrize("features", ["paper", "signal", "small_fc"])
def test_in_wide_layers_adam_has_a_share_from_the_start(features):
    shapes = [(300, 40), (7, 10), (40,), (8, 5, 4, 4), ()]
    wide = {"features": features, "normalize_step": features == "signal", "hidden_size": 8}

    def moved(width, trust=1.0):
        params = made_params(torch.float64, shapes)
        before = [p.detach().clone() for p in params]
        optimizer = LearnedOptimizer(params, weights=made_weights(width=width, **wide))
        optimizer.guard.trust = trust
        give_gradients(params, 0)
        optimizer.step()
        return [p.detach() - b for p, b in zip(params, before, strict=True)], optimizer

    (learned, whole), (adam, _), (found, optimizer) = moved(None), moved(None, 0.0), moved(20)
    for a, b, c, share in zip(learned, adam, found, (1 / 2, 1.0, 1.0, 1 / 4, 1.0), strict=True):
        torch.testing.assert_close(c, share * a + (1 - share) * b, rtol=1e-9, atol=1e-12)
    assert whole.learned_share == 1
    sizes = [12000, 70, 40, 640, 1]
    assert optimizer.learned_share == pytest.approx((6000 + 70 + 40 + 160 + 1) / sum(sizes))
    assert ["second_moment" in s for s in optimizer.state.values()] == [True, False, False, True, False]
    assert not any("second_moment" in s for s in whole.state.values())


def test_adams_moment_begins_with_its_share_for_each_tensor_by_itself():
    def train(shapes, absent, groups):
        params = made_params(torch.float64, shapes)
        given = [{"params": [p]} for p in params] if groups else params
        optimizer = LearnedOptimizer(given, weights=made_weights(clock=4, width=64, hidden_size=8))
        for t in range(9):
            give_gradients(params, t)
            params[-1].grad *= 100.0 if t < 2 else 0.1
            if t == absent:
                params[0].grad = None
            optimizer.step()
        return params[-1], optimizer.state[params[-1]]

    shapes = [(5, 400), (6, 8)]
    (together, a), (apart, b), (late, c) = (train(shapes, *x) for x in ((None, False), (None, True), (1, False)))
    assert difference([together, together], [apart, late]) < 1e-12
    for state in (a, b, c):
        assert int(state["adam_step"]) == 4  # the steps past the clock
        torch.testing.assert_close(state["second_moment"], a["second_moment"], rtol=1e-12, atol=0)


def test_adams_part_is_adam_also_after_gradients_of_zero():
    p, q = nn.Parameter(torch.ones(200, 30)), nn.Parameter(torch.ones(200, 30))
    optimizer = LearnedOptimizer([p], weights=made_weights(width=1), guard_lr=0.01)
    optimizer.guard.trust = 1e-9
    adam = torch.optim.Adam([q], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for t in range(30):
        g = torch.randn(200, 30, generator=generator) * (t > 2)
        p.grad, q.grad = g, g.clone()
        optimizer.step()
        adam.step()
    inside = (q - 1).abs() < 0.2
    assert float((p - q).abs().mean()) < 0.01 * float((q - 1).abs().mean())
    assert inside.all()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_adams_part_is_a_number_for_gradients_of_any_size(scale):
    params = made_params()
    run(params, scale=scale, weights=made_weights(width=2, clock=1))
    assert all(bool(p.isfinite().all()) for p in params)
    assert difference(params, made_params()) < 1.0


def test_a_step_is_limited():
    p = nn.Parameter(torch.ones(10))
    optimizer = LearnedOptimizer([p], weights=made_weights(step_mult=1e4))
    p.grad = torch.ones(10)
    optimizer.step()
    assert float((1 - p).abs().max()) == pytest.approx(optimizer.guard.step_limit, rel=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_sparse_complex_integer_and_sharded():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = LearnedOptimizer(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedTraining, match=r"LearnedOptimizer.*sparse.*SparseAdam"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="complex"):
        LearnedOptimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(UnsupportedTraining, match="floating"):
        LearnedOptimizer([nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)])
    sharded = nn.Parameter(torch.ones(3))
    sharded._is_flat_param = True
    with pytest.raises(UnsupportedTraining, match="FSDP"):
        LearnedOptimizer([sharded])


def test_arguments_out_of_range():
    params = made_params()
    for wrong, named in (
        ({"weights": "nothing-such"}, "lm-small"),
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"nonfinite": "ignore"}, "propagate"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"guard_lr": 0.0}, "lr"),
        ({"features": "small_fc"}, "signal"),
        ({"hidden_layers": 2}, "hidden_layers"),
    ):
        with pytest.raises(InvalidArgument, match=named):
            LearnedOptimizer(params, **wrong)
    with pytest.raises(ValueError, match="empty"):
        LearnedOptimizer([])


def test_weights_and_files(tmp_path):
    assert {"lm-small", "metz19"} <= set(available_weights())
    for name in available_weights():
        weights = load_weights(name)
        assert weights.horizon >= weights.clock >= 100
        assert weights.width >= 64
        assert {"tasks", "seed", "made_by", "command"} <= set(weights_card(name))
        again = load_weights(save_weights(tmp_path / f"{name}.json", weights))
        assert torch.equal(again.theta, weights.theta)
        assert again.fingerprint == weights.fingerprint
        assert (tmp_path / f"{name}.json").stat().st_size < 50_000
    (tmp_path / "wrong.json").write_text("{}")
    (tmp_path / "no.json").write_text("no")
    for path in ("wrong.json", "no.json"):
        with pytest.raises(InvalidArgument, match="weights"):
            load_weights(tmp_path / path)
    with pytest.raises(InvalidArgument, match="json"):
        save_weights(tmp_path / "x.pt", weights)
    with pytest.raises(InvalidArgument, match="finite"):
        Weights("nan", Architecture(), torch.full((706,), torch.nan))


# -- in a Trainer ------------------------------------------------------------------------------------------------------


class Tied(LightningModule):
    """A module with a shared, a frozen and an unused parameter, and a schedule."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.head, self.unused = nn.Linear(8, 3), nn.Linear(2, 2)

    def training_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self.head(torch.tanh(self.second(torch.tanh(self.first(x))))), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = LearnedOptimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=40, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_in_a_trainer(tmp_path):
    torch.manual_seed(0)
    module = Tied()
    frozen = module.second.bias.detach().clone()
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        callbacks=[LearningRateMonitor()],
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader())
    optimizer = trainer.optimizers[0]
    assert {int(s["step"]) for s in optimizer.state.values()} == {trainer.global_step}
    assert torch.equal(module.second.bias, frozen)
    assert optimizer.guard.seen == trainer.global_step
    assert trainer.callback_metrics["loss"] < 1.0
