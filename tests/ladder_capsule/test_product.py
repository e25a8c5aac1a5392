"""Products whose gradients lie in memory that is used again: the same numbers, and nobody's gradient overwritten."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_methods.ladder_capsule import LadderHead, PruningLayer
from lightning_methods.ladder_capsule import product as module
from lightning_methods.ladder_capsule.product import GradientMemory, product


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch) -> None:
    monkeypatch.setattr(module, "LARGE", 0)


def given(dtype: torch.dtype, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4 + transposed, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_those_of_a_product(transposed, dtype) -> None:
    x, weight = given(dtype, transposed)
    ours = product(x, weight, GradientMemory(), transposed=transposed)
    plain = x @ (weight.mT if transposed else weight)
    assert type(ours.grad_fn).__name__ == "_ProductBackward"
    assert torch.equal(ours, plain)
    for wanted in ((x, weight), (x,), (weight,)):
        gradients = [torch.autograd.grad(y.square().sum(), wanted, retain_graph=True) for y in (ours, plain)]
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_gradients_and_of_functions(transposed) -> None:
    x, weight = given(torch.float64, transposed)
    memory = GradientMemory()

    def squared(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return product(x, weight, memory, transposed=transposed).square()

    assert torch.autograd.gradgradcheck(squared, (x, weight))
    (expected,) = torch.autograd.grad(squared(x, weight).sum(), weight)
    assert torch.allclose(torch.func.grad(lambda w: squared(x.detach(), w).sum())(weight), expected)


def test_memory_is_used_again_only_when_no_tensor_lies_in_it() -> None:
    memory = GradientMemory()
    first = memory.take((2, 3), torch.float32)
    place, view = first.data_ptr(), first[0, :1]
    del first
    assert memory.take((2, 3), torch.float32).data_ptr() != place  # a view of it is left
    other = memory.take((2, 3), torch.float32)
    place = other.data_ptr()
    array = other.numpy()[1]
    del other
    assert memory.take((2, 3), torch.float32).data_ptr() != place  # an array of it is left
    del view, array
    last = memory.take((2, 3), torch.float32)
    place = last.data_ptr()
    del last
    assert memory.take((2, 3), torch.float32).data_ptr() == place
    assert memory.take((3, 2), torch.float64).shape == (3, 2)


def test_evaluation_gives_the_memory_back_and_leaves_gradients() -> None:
    head = LadderHead(12, 4, 5, 3, 6, hidden=(7, 9))
    head(PruningLayer(5)(torch.randn(3, 12, 3))).errors.sum().backward()
    weight = head.hyper.forward_maps.weight
    before = weight.grad.clone()
    user = head.hyper.forward_maps._memory._user
    assert user() is not None
    head.eval()
    assert torch.equal(weight.grad, before)
    weight.grad = None
    assert user() is None
    assert head.hyper.forward_maps._memory._whole is None


def test_gradients_that_are_kept_accumulated_or_used_twice() -> None:
    memory, weight = GradientMemory(), nn.Parameter(torch.randn(2, 4, 5))
    kept = []
    for scale in (1.0, 2.0, 3.0):
        weight.grad = None
        product(torch.full((2, 3, 4), scale), weight, memory).sum().backward()
        kept.append(weight.grad)
    assert [x.unique().tolist() for x in kept] == [[3.0], [6.0], [9.0]]
    product(torch.ones(2, 3, 4), weight, memory).sum().backward()  # on top of 9
    assert torch.equal(weight.grad, torch.full((2, 4, 5), 12.0))
    weight.grad = None
    x = torch.ones(2, 3, 4)
    (product(x, weight, memory).sum() + product(2 * x, weight, memory).sum()).backward()
    assert torch.equal(weight.grad, torch.full((2, 4, 5), 9.0))


def steps(large: int, monkeypatch, accumulate: int) -> list[torch.Tensor]:
    monkeypatch.setattr(module, "LARGE", large)
    torch.manual_seed(0)
    head = LadderHead(12, 4, 5, 3, 6, hidden=(7, 9))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for i in range(6):
        torch.manual_seed(i)
        head(PruningLayer(5)(torch.randn(3, 12, 3))).errors.square().sum().backward()
        if i % accumulate == accumulate - 1:
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in head.parameters()]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_same_to_the_bit(accumulate, monkeypatch) -> None:
    ours, plain = (steps(large, monkeypatch, accumulate) for large in (0, 2**40))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_modules_with_memory_are_copied_and_saved() -> None:
    head = LadderHead(12, 4, 5, 3, 6, hidden=(7, 9))
    pruned = PruningLayer(5)(torch.randn(3, 12, 3))
    head(pruned).errors.sum().backward()
    for again in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(again(pruned).errors, head(pruned).errors)
        again.zero_grad()
        again(pruned).errors.sum().backward()
        pairs = zip(head.parameters(), again.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) and a.grad.data_ptr() != b.grad.data_ptr() for a, b in pairs)
