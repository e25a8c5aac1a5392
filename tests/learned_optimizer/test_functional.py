"""The update rule and the estimators against values computed independently, and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.learned_optimizer import Architecture, ModuleTask, TruncationSchedule, combine_estimators
from lightning_methods.learned_optimizer.estimators import Episode, estimate
from lightning_methods.learned_optimizer.functional import (
    advance_small_fc,
    apply_network,
    factored_dims,
    learned_decay,
    small_fc_inputs,
    time_features,
)
from lightning_methods.learned_optimizer.pathologies import InfluenceBalancing, Wave
from lightning_methods.learned_optimizer.problem import InnerTraining
from lightning_methods.learned_optimizer.unrolled import UnrolledOptimizer, small_fc_shapes
from tests.learned_optimizer import oracle


@pytest.mark.parametrize(("zero", "wanted"), [(False, oracle.AFTER_3), (True, oracle.AFTER_2_ZEROS)])
def test_the_public_oracle_in_float64(zero, wanted):
    form = UnrolledOptimizer(Architecture(), oracle.SHAPES)
    theta = torch.from_numpy(np.concatenate([x.ravel() for x in oracle.parts().values()])).unsqueeze(0)
    params = [
        torch.tensor(p, dtype=torch.float64).view(1, *s) for p, s in zip(oracle.START, oracle.SHAPES, strict=True)
    ]
    state = form.begin(theta, 1)
    for t in range(2 if zero else 3):
        grads = [torch.from_numpy(oracle.gradient(i, t)).view_as(p) * (not zero) for i, p in enumerate(params)]
        params, state = form.step(theta, params, grads, state, t)
    for p, values in zip(params, wanted, strict=True):
        assert p.flatten().tolist() == pytest.approx(values, abs=2e-12)


def test_the_paper_rule_on_random_tensors():
    generator = torch.Generator().manual_seed(0)
    architecture = Architecture()
    theta = architecture.initial(generator).double()
    w = {k: v.numpy() for k, v in architecture.split(theta).items()}
    w = {"w0": w["w0"], "b0": w["b0"], "w1": w["w_out"], "b1": w["b_out"]}
    p = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    form, params = UnrolledOptimizer(architecture, [(50,)]), [p]
    state = form.begin(p, 2)
    own = [(p[i].numpy(), np.zeros((50, 6))) for i in (0, 1)]
    for t in range(4):
        g = torch.randn(2, 50, generator=generator, dtype=torch.float64) * 10.0 ** (t - 2)
        params, state = form.step(theta.expand(2, -1), params, [g], state, t)
        own = [oracle.paper_step(p, g[i].numpy(), m, t, w) for i, (p, m) in enumerate(own)]
    for i in (0, 1):
        np.testing.assert_allclose(params[0][i], own[i][0], rtol=1e-12)


def test_the_28_inputs_and_their_accumulators():
    rng = np.random.default_rng(0)
    shape = (6, 4)
    state = {k: torch.zeros(s, dtype=torch.float64) for k, s in small_fc_shapes(shape).items()}
    own = {k: v.numpy() for k, v in state.items()}
    three = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64)
    decays = {"momentum": three, "rms": three[2:], "factored": three}
    for _ in range(3):
        p, g = rng.normal(size=shape), rng.normal(size=shape)
        state = advance_small_fc(torch.from_numpy(g), state, decays, 2)
        inputs = small_fc_inputs(torch.from_numpy(g), torch.from_numpy(p), state, 2, factored_dims(shape))
        wanted, own = oracle.small_fc(p, g, own)
        np.testing.assert_allclose(inputs, wanted, rtol=1e-10)


def test_below_two_dimensions_rows_and_columns_are_the_second_moment():
    g = torch.tensor([1.0, -2.0])
    state = {k: torch.zeros(s) for k, s in small_fc_shapes((2,)).items()}
    decays = {"momentum": torch.full((3,), 0.5), "rms": torch.full((1,), 0.5), "factored": torch.full((3,), 0.5)}
    state = advance_small_fc(g, state, decays, 1)
    x = small_fc_inputs(g, torch.zeros(2), state, 1, None)
    assert x.shape == (28, 2)
    torch.testing.assert_close(x[13:16], torch.tensor([[0.5, 2.0]]).expand(3, -1))
    torch.testing.assert_close(x[16:19], x[13:16])
    torch.testing.assert_close(x[10:13], (g / torch.tensor([0.5, 2.0]).sqrt()).expand(3, -1))


def test_time_decays_and_dimensions():
    assert time_features(0).shape == (11,)
    assert time_features(torch.tensor(10))[2] == 0
    torch.testing.assert_close(time_features(7, dtype=torch.float64).numpy(), np.tanh(7 / oracle.TIMES - 1))
    assert learned_decay((0.9,), torch.tensor([0.1])).item() == pytest.approx(1 - 0.1 * math.e)
    assert learned_decay((0.9,), torch.tensor([10.0])).item() == 0
    assert factored_dims((5, 5)) == (-1, -2)
    assert factored_dims(()) is None


@pytest.mark.parametrize("layers", [1, 2])
def test_networks(layers):
    a = Architecture(hidden_size=3, hidden_layers=layers)
    weights = a.split(a.initial(torch.Generator().manual_seed(0)))
    x = torch.randn(5, 19)
    wanted = (x @ weights["w0"] + weights["b0"]).clamp(min=0)
    if layers == 2:
        wanted = (wanted @ weights["w1"] + weights["b1"]).clamp(min=0)
    torch.testing.assert_close(apply_network(weights, x), wanted @ weights["w_out"] + weights["b_out"])


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 706),
        ({"hidden_layers": 2}, 1762),
        ({"features": "small_fc"}, 1353),
        ({"features": "small_fc", "hidden_layers": 2}, 2409),
    ],
)
def test_sizes(settings, size):
    assert Architecture(**settings).size == size


@pytest.mark.parametrize(
    "settings", [{"hidden_layers": 3}, {"hidden_size": 0}, {"features": "sine"}, {"step_mult": float("nan")}]
)
def test_architectures_that_do_not_exist(settings):
    with pytest.raises(InvalidArgument):
        Architecture(**settings)


def test_a_wrong_number_of_weights():
    with pytest.raises(ShapeMismatch, match="706"):
        Architecture().split(torch.zeros(700))


def test_normalised_steps_have_the_size_that_is_asked_for_and_none_without_gradients():
    a = Architecture("signal", normalize_step=True, step_mult=0.01)
    theta = a.initial(torch.Generator().manual_seed(0)).double()
    weights = a.split(theta)
    weights["w_out"][:, 2] = 0  # nothing is asked for
    p = torch.randn(1, 400, dtype=torch.float64)
    form = UnrolledOptimizer(a, [(300,), (100,)])
    params = list(p.split([300, 100], 1))
    grads = [torch.randn(1, 300, dtype=torch.float64) * 1e-3, torch.zeros(1, 100, dtype=torch.float64)]
    new, _ = form.step(theta.unsqueeze(0), params, grads, form.begin(p, 1), 0)
    assert (new[0] - params[0]).square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(new[1], params[1])


# -- estimators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frequency", "gradient", "v_rp", "v_es", "weight"),
    [(30, -27.531147, 2.78, 1.40e3, 0.998), (300, -2.893294, 9.03e3, 9.8e2, 0.098), (3000, -1.4, 1.98e4, 26, 0.0013)],
)
def test_the_smoothed_wave(frequency, gradient, v_rp, v_es, weight):
    wave, theta, count = Wave(frequency), torch.tensor([0.3], dtype=torch.float64), 10_000
    assert wave.smoothed_gradient(0.3, 0.01) == pytest.approx(gradient, abs=1e-6)
    found = estimate(wave, theta, Episode(0, 1, {}), 1, range(count))
    for values, variance in ((found.reparam, v_rp), (found.es, v_es)):
        assert values.var().item() == pytest.approx(variance, rel=0.1)
        assert abs(values.mean().item() - gradient) < 4 * math.sqrt(variance / count)
    merged, share = combine_estimators(found.reparam, found.es)
    assert share.item() == pytest.approx(weight, rel=0.1)
    assert abs(merged.item() - gradient) < 5 * math.sqrt(1 / (1 / v_rp + 1 / v_es) / count)


@pytest.mark.parametrize(
    ("theta", "loss", "slope", "cut"), [(0.5, 19.895687, 71.432613, -0.52), (0.0, 0.511995, 6.102155, -1.1)]
)
def test_truncation_points_the_wrong_way(theta, loss, slope, cut):
    system, steps = InfluenceBalancing(), 100
    start = torch.full((2, 1), theta, dtype=torch.float64, requires_grad=True)
    losses, _ = system.unroll(start, system.begin(start, [0]), 0, steps, [0], differentiable=True)
    assert losses[0].mean().item() == pytest.approx(loss, abs=1e-6)
    (whole,) = torch.autograd.grad(losses[0].mean(), start)
    assert whole[0].item() == pytest.approx(slope, abs=1e-6)
    # every step's own share, with what came before held constant
    state, shares = system.begin(start, [0]), []
    for t in range(steps):
        losses, state = system.unroll(start, {k: v.detach() for k, v in state.items()}, t, 1, [0], differentiable=True)
        shares.append(torch.autograd.grad(losses[0].sum(), start)[0][0].item())
    assert sum(shares) / steps == pytest.approx(cut, abs=1e-6)


@pytest.mark.parametrize(("estimator", "wanted"), [("es", -0.52), ("pes", 71.432613), ("nres", 71.432613)])
def test_which_estimators_are_unbiased_over_truncations(estimator, wanted):
    system, theta, pairs, steps = InfluenceBalancing(), torch.tensor([0.5], dtype=torch.float64), 1500, 100
    episode = Episode(0, steps, system.begin(theta, range(pairs)))
    total = torch.zeros(pairs, dtype=torch.float64)
    for k in range(steps):
        seeds = [k * pairs + i for i in range(pairs)]
        found = estimate(system, theta, episode, 1, seeds, estimator=estimator)
        assert found.reparam is None
        total += found.es[:, 0] / steps
    error = total.std().item() / math.sqrt(pairs)
    assert abs(total.mean().item() - wanted) < 4 * error
    assert episode.is_over


def made_task(module=None, **settings):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 5, generator=generator)
    module = module or nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return ModuleTask(module, inputs.double(), torch.arange(40) % 3, batch_size=8, **settings)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("features", ["paper", "signal", "small_fc"])
def test_reparameterisation_is_the_derivative_of_the_same_loss(features, normalize):
    a = Architecture(features, hidden_size=5, step_mult=0.05, normalize_step=normalize)
    theta = a.initial(torch.Generator().manual_seed(0)).double()
    problem = InnerTraining(a, made_task(module=nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()))
    noise = torch.zeros(1, a.size, dtype=torch.float64)
    seeds, steps = [3], 5

    def loss(at):
        both = torch.cat([at, at])
        return problem.unroll(both, problem.begin(both, seeds), 0, steps, seeds, differentiable=False)[0][0].mean()

    episode = Episode(0, steps, problem.begin(theta, seeds), noise=noise)
    found = estimate(problem, theta, episode, steps, seeds, sigma=1e-12)
    direction = torch.randn(1, a.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h = 1e-6
    numeric = (loss(theta + h * direction) - loss(theta - h * direction)) / (2 * h)
    assert (found.reparam @ direction[0]).item() == pytest.approx(numeric.item(), rel=1e-5)


def test_the_logarithm_of_the_loss_divides_the_gradient_by_it():
    a, floor, sigma = Architecture(hidden_size=4, step_mult=0.05), 0.01, 0.02
    problem = InnerTraining(a, made_task(module=nn.Linear(5, 3).double()))
    theta, seeds = a.initial(torch.Generator().manual_seed(0)).double(), [1, 2, 3]

    def found(sigma, log_floor):
        episode = Episode(0, 4, problem.begin(theta, seeds))
        return estimate(problem, theta, episode, 4, seeds, sigma=sigma, log_floor=log_floor), episode.noise

    (plain, _), (logs, _) = found(1e-12, None), found(1e-12, floor)
    torch.testing.assert_close(logs.losses, plain.losses)
    torch.testing.assert_close(logs.reparam, plain.reparam / (plain.losses[:3, None] + floor))
    logs, noise = found(sigma, floor)
    plus, minus = (logs.losses + floor).log().chunk(2)
    torch.testing.assert_close(logs.es, (plus - minus)[:, None] * noise / (2 * sigma**2))


def test_pairs_share_everything_but_the_noise():
    a = Architecture(hidden_size=4)
    problem = InnerTraining(a, made_task(module=nn.Linear(5, 3).double()))
    theta = a.initial(torch.Generator().manual_seed(0)).double().expand(4, -1)
    losses, _ = problem.unroll(theta, problem.begin(theta, [1, 2]), 0, 4, [1, 2], differentiable=False)
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])
    assert not torch.equal(losses[0], losses[1])


def test_combining_weighs_by_inverse_variance_whatever_the_order():
    generator = torch.Generator().manual_seed(0)
    rp, es = torch.randn(7, 5, generator=generator) * 3, torch.randn(7, 5, generator=generator)
    gradient, weight = combine_estimators(rp, es)
    v = [x.double().var(0) for x in (rp, es)]
    wanted = v[1] / (v[0] + v[1])
    torch.testing.assert_close(weight, wanted.float())
    torch.testing.assert_close(gradient, (wanted * rp.mean(0) + (1 - wanted) * es.mean(0)).float())
    order = torch.randperm(7, generator=generator)
    torch.testing.assert_close(combine_estimators(rp[order], es[order])[0], gradient)


def test_combining_at_its_limits():
    two = torch.tensor([[1.0], [3.0]])
    none = torch.full((2, 1), 5.0)
    assert combine_estimators(none, two)[0].item() == 5  # no variance at all: it alone
    assert combine_estimators(two, none)[0].item() == 5
    assert combine_estimators(none, none + 1)[1].item() == 0.5
    for broken in (torch.nan, torch.inf, -torch.inf):
        gradient, weight = combine_estimators(
            torch.tensor([[1.0, 1.0], [broken, 1.5]]), torch.tensor([[2.0, 2.0], [4.0, 4.0]])
        )
        assert weight[0] == 0
        assert gradient[0] == 3
        assert weight[1] > 0.9
    given = combine_estimators(two, two + 1, variance=(torch.tensor([1.0]), torch.tensor([torch.inf])))
    assert given[1].item() == 1
    assert given[0].item() == 2


def test_combining_what_cannot_be_combined():
    one = torch.ones(1, 3)
    with pytest.raises(InvalidArgument, match="ema"):
        combine_estimators(one, one)
    assert combine_estimators(one, one, variance=(one[0], one[0]))[1].tolist() == [0.5] * 3
    with pytest.raises(ShapeMismatch):
        combine_estimators(torch.ones(2, 3), torch.ones(3, 3))


def test_schedules():
    grows = TruncationSchedule("linear", 10, 20, over_steps=10)
    assert [grows.length(s) for s in (0, 5, 10, 99)] == [10, 15, 20, 20]
    assert TruncationSchedule("constant", 7).length(3) == 7
    drawn = TruncationSchedule("log_uniform", 50, 1000)
    lengths = [drawn.length(0, torch.Generator().manual_seed(i)) for i in range(300)]
    assert 50 <= min(lengths) < 60
    assert 850 < max(lengths) <= 1000
    assert np.median(lengths) == pytest.approx(math.sqrt(50 * 1000), rel=0.3)
    for wrong in ({"kind": "cosine"}, {"start": 0}, {"kind": "log_uniform", "start": 9, "end": 3}, {"over_steps": 0}):
        with pytest.raises(InvalidArgument):
            TruncationSchedule(**wrong)
