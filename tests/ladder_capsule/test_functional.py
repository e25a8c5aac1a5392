"""The maths: values of the card, invariants, zeros and infinities, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.ladder_capsule import functional as f
from tests.ladder_capsule import oracle

FLOATS = st.floats(-1e4, 1e4, width=32)


def tensor(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def kept() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return activities, kept positions and squashed kept capsules of the card's example."""
    capsules = tensor(oracle.CAPSULES)
    activity = f.activities(capsules)
    indices = f.top_capsules(activity, oracle.K)
    return activity, indices, f.squash(capsules.gather(1, indices[..., None].expand(-1, -1, oracle.DIM)))


# --- values of the card


def test_pruning_of_the_card() -> None:
    activity, indices, _ = kept()
    assert torch.allclose(activity, tensor(oracle.ACTIVITY), atol=1e-10, rtol=0)
    assert indices.tolist() == oracle.KEPT
    assert f.code_vector(indices, oracle.N).tolist() == [[1, 0, 0, 1, 1, 0]] * 2


def test_ladder_of_the_card() -> None:
    _, _, active = kept()
    found = f.ladder_inference(active, *map(tensor, (oracle.FORWARD, oracle.INVERSE, oracle.COUPLING)))
    assert torch.allclose(found.errors, tensor(oracle.ERRORS), atol=1e-10, rtol=0)
    assert torch.allclose(found.poses[:, 0], tensor(oracle.POSE_OF_CLASS_0), atol=1e-10, rtol=0)
    assert found.errors.argmin(1).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["code", "paper"])
def test_losses_of_the_card(name: f.LossName) -> None:
    activity, indices, _ = kept()
    errors, labels = tensor(oracle.ERRORS), torch.tensor(oracle.LABELS)
    code = f.code_vector(indices, oracle.N, torch.float64)
    data, reg, total = oracle.LOSSES[name]
    assert f.ladder_loss(errors, labels, loss=name).item() == pytest.approx(data, abs=1e-9)
    assert f.code_regulariser(code, activity, f.PRESETS[name].reg).item() == pytest.approx(reg, abs=1e-9)
    assert f.ladder_loss(errors, labels, code, activity, loss=name).item() == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("iters", [1, 2, 3])
def test_routing_of_the_card(iters: int, detach: bool) -> None:
    capsules = f.squash(tensor(oracle.ROUTED_CAPSULES))
    votes = torch.einsum("nd,cnde->cne", capsules, tensor(oracle.ROUTED_MAPS))[None]
    lengths = f.dynamic_routing(votes, iters, detach=detach).norm(dim=-1)[0]
    assert torch.allclose(lengths, tensor(oracle.ROUTED_LENGTHS[iters]), atol=1e-9, rtol=0)


# --- squash and norms


@given(st.lists(FLOATS, min_size=1, max_size=6))
def test_squash_is_the_formula(values: list[float]) -> None:
    s = tensor(values)
    assert torch.allclose(f.squash(s), tensor(oracle.squash(s.numpy())), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e-8, 1.0, 6e4, 1e19, 3e38])
def test_values_and_gradients_are_finite_at_every_size(dtype: torch.dtype, size: float) -> None:
    if size > torch.finfo(dtype).max:
        pytest.skip("no such number")
    for function in (f.squash, lambda x: f.activities(x[None]), f.safe_norm):
        if function is f.safe_norm and size > 1e38:
            continue  # the norm itself is too large for float32
        x = torch.full((3, 4), size, dtype=dtype, requires_grad=True)
        value = function(x)
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(x.grad).all()
    length = f.squash(torch.full((4,), size, dtype=dtype)).norm()
    assert length <= 1 + 1e-6
    assert size < 1e19 or length > 1 - 1e-6


def test_squash_runs_along_any_dimension_and_in_wide_precision() -> None:
    s = torch.randn(3, 4, 5)
    assert torch.allclose(f.squash(s, 1), f.squash(s.transpose(1, 2)).transpose(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(f.squash(s), f.squash(s.clone()))
        assert f.squash(s.bfloat16()).dtype == torch.float32


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f.squash, x)
    assert torch.autograd.gradcheck(f.safe_norm, x)
    votes = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: f.dynamic_routing(v, detach=False), votes)


# --- layout, pruning


def test_a_capsule_is_channels_of_one_position_not_neighbouring_pixels() -> None:
    types, dim, h, w = 3, 4, 2, 5
    maps = torch.arange(types * dim * h * w).view(1, types * dim, h, w)
    capsules = f.capsules_of(maps, dim)
    for n in range(h * w * types):
        y, x, kind = n // (w * types), n // types % w, n % types
        assert capsules[0, n].tolist() == maps[0, kind * dim : (kind + 1) * dim, y, x].tolist()
    with pytest.raises(ShapeMismatch, match="cannot be divided into capsules of 5"):
        f.capsules_of(maps, 5)


def test_ties_are_broken_by_the_lowest_position() -> None:
    activity = torch.tensor([[0.5, 0.1, 0.5, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert f.top_capsules(activity, 3).tolist() == [[0, 2, 4], [0, 1, 2]]
    assert f.top_capsules(activity, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(0, 2**31))
def test_less_active_capsules_change_nothing(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    activity = torch.rand(4, 8, generator=generator)
    indices = f.top_capsules(activity, k)
    assert torch.equal(indices, indices.sort(dim=1).values)
    kept_activity = activity.gather(1, indices)
    assert torch.equal(kept_activity.sort().values, activity.topk(k).values.sort().values)
    more = torch.cat([activity, kept_activity.amin(1, keepdim=True) * torch.rand(4, 3, generator=generator)], 1)
    assert torch.equal(f.top_capsules(more, k), indices)


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_capsules(k: int) -> None:
    with pytest.raises(InvalidArgument, match=f"k={k} of 4 capsules"):
        f.top_capsules(torch.rand(1, 4), k)


# --- the ladder


def ladder(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 5, 2), (3, 4, 5, 2, 6), (3, 4, 5, 2, 6), (3, 4, 5))
    active, *rest = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [f.squash(active), *rest[:2], rest[2].sigmoid()]


def test_poses_have_length_one_and_errors_lie_between_0_and_2() -> None:
    found = f.ladder_inference(*ladder())
    assert torch.allclose(found.poses.norm(dim=-1), torch.ones(4, 3, dtype=torch.float64), atol=1e-7)
    assert (found.errors >= 0).all()
    assert (found.errors <= 2).all()


def test_errors_do_not_depend_on_the_length_of_the_sum() -> None:
    active, forward, inverse, coupling = ladder()
    errors = f.ladder_inference(active, forward, inverse, coupling).errors
    assert torch.allclose(f.ladder_inference(active, 7 * forward, inverse, coupling).errors, errors, atol=1e-7)


def test_classes_can_be_permuted() -> None:
    active, *maps = ladder()
    order = torch.tensor([2, 0, 1])
    permuted = f.ladder_inference(active, *(m[order] for m in maps))
    assert torch.equal(permuted.errors, f.ladder_inference(active, *maps).errors[:, order])


def test_no_capsule_and_no_vote_are_finite() -> None:
    active, forward, inverse, coupling = (x.clone().requires_grad_() for x in ladder())
    zero = torch.zeros_like(active, requires_grad=True)
    for given_active, given_maps in ((zero, forward), (active, torch.zeros_like(forward, requires_grad=True))):
        found = f.ladder_inference(given_active, given_maps, inverse, coupling)
        gradients = torch.autograd.grad(found.errors.sum(), [given_active, given_maps, inverse, coupling])
        assert all(torch.isfinite(x).all() for x in (*found, *gradients))


def test_ladder_refuses_what_does_not_fit() -> None:
    active, forward, inverse, coupling = ladder()
    with pytest.raises(ShapeMismatch, match="do not fit together"):
        f.ladder_inference(active[:, :4], forward, inverse, coupling)


# --- routing


def test_routing_equals_loops() -> None:
    torch.manual_seed(0)
    votes = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert torch.allclose(f.dynamic_routing(votes), oracle.direct_routing(votes, 3), atol=1e-10)


def test_routing_with_and_without_the_gradient_of_all_iterations() -> None:
    torch.manual_seed(0)
    votes = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    detached, full = f.dynamic_routing(votes), f.dynamic_routing(votes, detach=False)
    assert torch.equal(detached, full)
    a, b = (torch.autograd.grad(x.square().sum(), votes)[0] for x in (detached, full))
    assert not torch.allclose(a, b)
    assert torch.autograd.grad(f.dynamic_routing(votes, 1).sum(), votes)[0].abs().sum() > 0


def test_one_iteration_is_the_uniform_mean() -> None:
    votes = torch.randn(2, 3, 4, 5)
    assert torch.allclose(f.dynamic_routing(votes, 1), f.squash(votes.sum(2) / 3), atol=1e-6)


def test_routing_refuses() -> None:
    with pytest.raises(InvalidArgument, match="iters=0"):
        f.dynamic_routing(torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(ShapeMismatch, match=r"\(B, C, N, D\)"):
        f.dynamic_routing(torch.zeros(2, 3, 4))


# --- losses


def test_the_codes_loss_is_its_own_formula() -> None:
    torch.manual_seed(0)
    errors, y = 2 * torch.rand(8, 5, dtype=torch.float64), torch.randint(5, (8,))
    true = torch.nn.functional.one_hot(y, 5)
    written = (true * errors**2 + (1 - true) * (0.8 - errors).clamp(min=0) ** 2).sum(1).mean()
    assert torch.allclose(f.ladder_loss(errors, y, loss="code"), written, atol=1e-12)


def test_every_constant_can_be_set() -> None:
    errors, y = torch.tensor([[0.3, 0.4]]), torch.tensor([0])
    code, activity = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.4, 0.5]])
    usual = f.ladder_loss(errors, y, code, activity)
    changed = [{"m_plus": 1.0}, {"m_minus": 0.2}, {"lam": 1.0}, {"reg_weight": 1.0}, {"reg": "l1_mean"}]
    values = [f.ladder_loss(errors, y, code, activity, **c).item() for c in changed]
    assert len({round(v, 9) for v in (usual.item(), *values)}) == 6
    same = f.ladder_loss(errors, y, code, activity, m_plus=1.0, m_minus=0.2, lam=1.0, reg="l1_mean")
    assert torch.equal(same, f.ladder_loss(errors, y, code, activity, loss="code"))


def test_targets_as_classes_one_hot_several_and_soft() -> None:
    activity = torch.rand(4, 3)
    y = torch.tensor([0, 2, 1, 1])
    one_hot = torch.nn.functional.one_hot(y, 3)
    assert torch.equal(f.margin_loss(activity, y), f.margin_loss(activity, one_hot))
    assert torch.equal(f.margin_loss(activity, y), f.margin_loss(activity, one_hot.bool()))
    soft = 0.5 * one_hot + 0.5 * one_hot.roll(1, 0)
    mean = 0.5 * (f.margin_loss(activity, one_hot) + f.margin_loss(activity, one_hot.roll(1, 0)))
    assert torch.allclose(f.margin_loss(activity, soft), mean)


def test_the_code_vector_is_constant_and_activities_are_not() -> None:
    activity = torch.rand(2, 4, requires_grad=True)
    code = torch.ones(2, 4, requires_grad=True)
    f.code_regulariser(code, activity).backward()
    assert code.grad is None
    assert (activity.grad != 0).all()


@pytest.mark.parametrize("y", [[3], [-1]])
def test_classes_out_of_range(y: list[int]) -> None:
    with pytest.raises(InvalidArgument, match="is num_classes right"):
        f.margin_loss(torch.rand(1, 3), torch.tensor(y))


@pytest.mark.parametrize(
    ("activity", "target", "error", "message"),
    [
        (torch.rand(2, 3), torch.tensor([0.0, 1.0]), InvalidArgument, "Whole numbers"),
        (torch.rand(2, 3), torch.rand(2, 4), ShapeMismatch, r"\(B, 3\)"),
        (torch.rand(2, 3), torch.full((2, 3), 1.5), InvalidArgument, "outside of 0 to 1"),
        (torch.rand(2, 3), torch.tensor([0]), ShapeMismatch, "do not fit"),
        (torch.rand(3), torch.tensor([0, 1, 1]), ShapeMismatch, "do not fit"),
    ],
)
def test_targets_that_cannot_be_read(activity, target, error, message) -> None:
    with pytest.raises(error, match=message):
        f.margin_loss(activity, target)


def test_losses_refuse() -> None:
    errors, y = torch.rand(2, 3), torch.tensor([0, 1])
    with pytest.raises(InvalidArgument, match="loss='text' is not known"):
        f.ladder_loss(errors, y, loss="text")
    with pytest.raises(InvalidArgument, match="Only one of code and activity"):
        f.ladder_loss(errors, y, torch.ones(2, 4))
    with pytest.raises(InvalidArgument, match="reg='l1' is not known"):
        f.code_regulariser(torch.ones(2, 4), torch.ones(2, 4), "l1")
    with pytest.raises(ShapeMismatch, match=r"\(B, N\)"):
        f.code_regulariser(torch.ones(2, 4), torch.ones(2, 5))
    with pytest.raises(ShapeMismatch, match="as many values"):
        f.reconstruction_loss(torch.ones(2, 4), torch.ones(2, 1, 3, 3))
