"""The interception alone: every loss function, in every way to call it, equals the weights written by hand."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy as imported_by_name
from torch.utils.checkpoint import CheckpointError, checkpoint

from lightning_methods.errors import BatchFormat, InvalidArgument, ShapeMismatch
from lightning_methods.importance_weighting.functions import LOSSES, StandIns, thread
from lightning_methods.importance_weighting.interception import LossInterception, ModuleInterception
from lightning_methods.importance_weighting.weights import BatchWeights

CARD_LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-1.0, 3.0, 0.0]], dtype=torch.float64)
CARD_TARGETS = torch.tensor([0, 2, 1])
CARD_WEIGHTS = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


class Weighted:
    """Runs a function with its losses weighted, as a training step would."""

    def __init__(self, table=None, *, normalize="none", match="auto", batch=None, labels=None, samples=None):
        self.weights = BatchWeights(normalize, match, labels, samples, lambda w: w)
        self.weights.set_table(None if table is None else torch.as_tensor(table, dtype=torch.float64), 1.0)
        self.batch, self.stand_ins = batch, StandIns()

    def __call__(self, function):
        first, again = self.once(function), self.once(function)
        # the second time the weights are at hand, and the call may go the quick way: to the same bits
        assert torch.allclose(first, again, rtol=0, atol=0, equal_nan=True)
        return again

    def once(self, function):
        self.stand_ins.put_in_place()
        self.weights.begin(self.batch, first=True)
        try:
            with LossInterception(self.weights):
                return function()
        finally:
            self.stand_ins.put_back()


def leaf(*shape, kind=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=kind).requires_grad_()


def test_the_card():
    z = CARD_LOGITS.clone().requires_grad_()
    losses = F.cross_entropy(z, CARD_TARGETS, reduction="none")
    assert losses.tolist() == pytest.approx([0.241311296657, 1.001942848229, 0.065883903757], abs=1e-11)

    def step():
        return F.cross_entropy(z, CARD_TARGETS)

    assert float(Weighted(CARD_WEIGHTS)(step).detach()) == pytest.approx(1.460283499030, abs=1e-11)
    batch = Weighted(CARD_WEIGHTS, normalize="batch")(step)
    assert float(batch.detach()) == pytest.approx(0.625835785298, abs=1e-11)
    assert torch.allclose(batch, F.cross_entropy(z, CARD_TARGETS, weight=CARD_WEIGHTS), rtol=1e-14)
    mean1 = Weighted(CARD_WEIGHTS / CARD_WEIGHTS.mean(), normalize="mean1")(step)
    assert float(mean1.detach()) == pytest.approx(0.625835785298, abs=1e-11)


def test_batch_and_mean_one_differ_on_another_batch():
    z, y = leaf(5, 3, kind=torch.float64), torch.tensor([0, 0, 0, 2, 0])
    table = CARD_WEIGHTS / CARD_WEIGHTS.mean()
    batch = Weighted(table, normalize="batch")(lambda: F.cross_entropy(z, y))
    mean1 = Weighted(table, normalize="mean1")(lambda: F.cross_entropy(z, y))
    assert torch.allclose(batch, F.cross_entropy(z, y, weight=CARD_WEIGHTS), rtol=1e-12)
    assert abs(float((batch - mean1).detach())) > 0.1


Y = torch.tensor([0, 1, 2, 1, 0, 2])
W = torch.tensor([0.5, 1.0, 3.0])
T2 = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
SAMPLES = torch.tensor([0.2, 1.0, 0.0, 4.0, 2.5, 0.7])

# name -> logits, target, further arguments, and the module of the same name
CALLS = {
    "cross_entropy": ((6, 3), Y, {}, nn.CrossEntropyLoss),
    "nll_loss": ((6, 3), Y, {}, nn.NLLLoss),
    "binary_cross_entropy": ((6,), T2, {}, nn.BCELoss),
    "binary_cross_entropy_with_logits": ((6,), T2, {}, nn.BCEWithLogitsLoss),
    "mse_loss": ((6, 2), torch.ones(6, 2), {}, nn.MSELoss),
    "l1_loss": ((6, 2), torch.ones(6, 2), {}, nn.L1Loss),
    "smooth_l1_loss": ((6, 2), torch.ones(6, 2), {"beta": 0.5}, nn.SmoothL1Loss),
    "huber_loss": ((6, 2), torch.ones(6, 2), {"delta": 0.5}, nn.HuberLoss),
    "kl_div": ((6, 3), torch.full((6, 3), 1 / 3), {}, nn.KLDivLoss),
}


def case(name):
    shape, target, more, module = CALLS[name]
    x = leaf(*shape)
    if name == "binary_cross_entropy":
        x = torch.sigmoid(x)
    return x, target, more, module


def test_all_functions_of_the_issue_are_caught():
    assert {kind.name for kind in LOSSES.values()} == set(CALLS)
    assert all(getattr(F, kind.name) is function for function, kind in LOSSES.items())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.filterwarnings("ignore:.*divides the total loss.*")
def test_sample_weights_in_every_function_and_module(name, reduction):
    x, target, more, module = case(name)
    function = getattr(F, name)
    losses = function(x, target, reduction="none", **more)
    by_hand = SAMPLES.view(-1, *[1] * (losses.ndim - 1)) * losses
    by_hand = {"mean": by_hand.mean, "sum": by_hand.sum, "none": by_hand.clone}[reduction]()
    weighted = Weighted(samples=1, batch=(None, SAMPLES))
    assert torch.equal(weighted(lambda: function(x, target, reduction=reduction, **more)), by_hand)
    assert torch.equal(weighted(lambda: module(reduction=reduction, **more)(x, target)), by_hand)
    assert weighted.weights.hits == 1


@pytest.mark.parametrize("name", CALLS)
def test_class_weights_in_every_function(name):
    x, target, more, _ = case(name)
    losses = getattr(F, name)(x, target, reduction="none", **more)
    binary = name.startswith("binary")
    w = torch.tensor([0.5, 3.0])[T2.long()] if binary else W[Y]
    by_hand = (w.view(-1, *[1] * (losses.ndim - 1)) * losses).mean()
    # targets that are no classes have theirs in the batch
    weighted = Weighted([0.5, 3.0] if binary else W, batch=(None, Y))
    assert torch.allclose(weighted(lambda: getattr(F, name)(x, target, **more)), by_hand, rtol=1e-6)


def test_the_gradient_is_that_of_the_weights_by_hand_bit_for_bit():
    x, y = leaf(6, 3), Y
    (W[y] * F.cross_entropy(x, y, reduction="none")).mean().backward()
    by_hand, x.grad = x.grad, None
    Weighted(W)(lambda: F.cross_entropy(x, y)).backward()
    assert torch.equal(x.grad, by_hand)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.cross_entropy(x, Y),
        lambda x: F.cross_entropy(input=x, target=Y),
        lambda x: F.cross_entropy(x, target=Y, reduction="mean"),
        lambda x: F.cross_entropy(x, Y, None, None, -100, None, "mean", 0.0),
        lambda x: F.cross_entropy(x, Y, None, True),
        lambda x: nn.CrossEntropyLoss()(x, Y),
        lambda x: imported_by_name(x, Y),
    ],
    ids=range(7),
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_every_way_to_call_it(call):
    x = leaf(6, 3)
    by_hand = (W[Y] * F.cross_entropy(x, Y, reduction="none")).mean()
    assert torch.allclose(Weighted(W)(lambda: call(x)), by_hand, rtol=1e-7)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [F.cross_entropy, lambda x, y: F.cross_entropy(x * 1.0, y)], ids=["loss", "step"])
def test_a_compiled_loss_is_weighted_and_counted_or_neither(function, backend):
    x = leaf(6, 3)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend)
    plain = F.cross_entropy(x, Y)
    by_hand = (W[Y] * F.cross_entropy(x, Y, reduction="none")).mean()
    for _ in range(3):  # traced once, run again from the cache
        weighted = Weighted(W)
        found = weighted(lambda: compiled(x, Y))
        # a fit without hits is refused
        assert torch.allclose(found, by_hand if weighted.weights.hits else plain)
    other = Weighted(W.flip(0))
    found = other(lambda: compiled(x, Y))
    flipped = (W.flip(0)[Y] * F.cross_entropy(x, Y, reduction="none")).mean()
    assert torch.allclose(found, flipped if other.weights.hits else plain)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_loss_that_is_compiled_while_the_quick_way_is_open(backend):
    x, weighted = leaf(6, 3), Weighted(W)
    plain, by_hand = F.cross_entropy(x, Y), weighted(lambda: F.cross_entropy(x, Y))
    assert weighted.weights.quick is not None
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: F.cross_entropy(x, y), backend=backend)
    found = weighted.once(lambda: compiled(x, Y))
    assert torch.allclose(found, by_hand if weighted.weights.hits else plain)
    # and nothing of the weights has stayed in what was compiled
    assert torch.equal(compiled(x, Y), plain)


ALIASES = {
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.0),
    "default argument": lambda x, y, loss=F.cross_entropy: loss(x, y),
    "attribute": type("Holder", (), {"loss": staticmethod(F.cross_entropy)}).loss,
    "in a list": [F.cross_entropy][0],
}


@pytest.mark.parametrize("alias", ALIASES)
def test_functions_that_were_bound_before(alias):
    x, weighted = leaf(6, 3), Weighted(W)
    by_hand = (W[Y] * F.cross_entropy(x, Y, reduction="none")).mean()
    assert torch.equal(weighted(lambda: ALIASES[alias](x, Y)), by_hand)
    assert weighted.weights.hits == 1


def codes():
    return [function.__code__ for function in LOSSES]


def test_the_functions_are_what_they_were_afterwards():
    before, names = codes(), set(vars(F))
    one, other = StandIns(), StandIns()
    one.put_in_place()
    one.put_in_place()  # harmless
    assert not set(map(id, before)) & set(map(id, codes()))
    other.put_in_place()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(other)))
    copied.put_back()
    one.put_back()
    one.put_back()
    assert codes()[0] is not before[0], "the other fit still needs them"
    other.put_back()
    assert all(a is b for a, b in zip(codes(), before, strict=True))
    assert set(vars(F)) == names


def test_code_that_somebody_else_has_put_there_stays():
    def shifted(input, target, *args, **kwargs):
        return torch.full((), 7.0)

    before, stand_ins = F.l1_loss.__code__, StandIns()
    try:
        F.l1_loss.__code__ = shifted.__code__
        stand_ins.put_in_place()
        assert float(F.l1_loss(torch.zeros(2), torch.zeros(2))) == 7
        stand_ins.put_back()
        assert F.l1_loss.__code__ is shifted.__code__
    finally:
        F.l1_loss.__code__ = before


@pytest.mark.filterwarnings("ignore")
def test_in_place_but_not_caught_all_is_as_ever():
    stand_ins = StandIns()
    plain = {name: getattr(F, name)(*case(name)[:2], **case(name)[2]) for name in CALLS}
    stand_ins.put_in_place()
    try:
        for name in CALLS:
            assert torch.equal(getattr(F, name)(*case(name)[:2], **case(name)[2]), plain[name])
        with pytest.raises(TypeError, match="cross_entropy"):
            F.cross_entropy(leaf(2, 3))
        assert torch.equal(torch.jit.trace(F.mse_loss, (torch.ones(2), torch.zeros(2)))(*torch.eye(2)), torch.ones(()))
    finally:
        stand_ins.put_back()


def test_what_another_thread_computes_meanwhile_is_not_weighted():
    x, weighted, found = leaf(6, 3), Weighted(W), {}
    plain = F.cross_entropy(x, Y)

    def other():
        found["other"] = F.cross_entropy(leaf(6, 3), Y)

    def step():
        worker = threading.Thread(target=other)
        worker.start()
        worker.join()
        return F.cross_entropy(x, Y)

    assert torch.equal(weighted(step), (W[Y] * F.cross_entropy(x, Y, reduction="none")).mean())
    assert torch.equal(found["other"], plain)
    assert weighted.weights.hits == 1


def test_two_threads_weight_their_own_losses():
    x, start = leaf(6, 3), threading.Barrier(2)
    tables, found = {0: W, 1: W.flip(0)}, {}

    def work(i):
        weighted = Weighted(tables[i])

        def step():
            start.wait(30)
            return F.cross_entropy(x, Y)

        found[i] = [weighted.once(step) for _ in range(50)]

    workers = [threading.Thread(target=work, args=(i,)) for i in tables]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, table in tables.items():
        by_hand = (table[Y] * F.cross_entropy(x, Y, reduction="none")).mean()
        assert all(torch.allclose(value, by_hand, rtol=1e-6) for value in found[i])


def test_an_exception_in_the_step_leaves_nothing_behind():
    weighted, before = Weighted(W), codes()
    with pytest.raises(ZeroDivisionError):
        weighted.once(lambda: 1 / 0)
    with pytest.raises(ValueError, match="batch_size"):
        weighted.once(lambda: F.cross_entropy(leaf(6, 3), Y[:2]))
    assert thread.catcher is None
    assert codes() == before


class Traced(torch.Tensor):
    """A tensor whose functions go through Python, and come back to the same function."""


def test_subclasses_of_tensors_and_modes_are_weighted_once():
    x = leaf(6, 3)
    by_hand = (W[Y] * F.cross_entropy(x, Y, reduction="none")).mean()
    weighted = Weighted(W)
    got = weighted(lambda: F.cross_entropy(x.as_subclass(Traced), Y))
    assert isinstance(got, Traced)
    assert torch.equal(got.as_subclass(torch.Tensor), by_hand)
    assert weighted.weights.hits == 1

    def under_a_mode():
        with torch.device("cpu"):  # a mode that sees every function
            return F.cross_entropy(x, Y)

    assert torch.equal(weighted(under_a_mode), by_hand)
    assert weighted.weights.hits == 1


def test_transforms_of_functions():
    x, weighted = leaf(6, 3), Weighted(W)
    by_hand = torch.autograd.grad((W[Y] * F.cross_entropy(x, Y, reduction="none")).mean(), x)[0]
    assert torch.allclose(weighted(lambda: torch.func.grad(lambda z: F.cross_entropy(z, Y))(x.detach())), by_hand)
    assert weighted.weights.hits == 1
    # inside of vmap no tensor says that it requires a gradient: nothing is counted, and such a step is refused
    pairs = leaf(2, 6, 3)
    several = weighted.once(lambda: torch.func.vmap(lambda z: F.cross_entropy(z, Y))(pairs))
    assert weighted.weights.hits == 0
    assert torch.allclose(several, torch.stack([F.cross_entropy(z, Y) for z in pairs]))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_loss_by_hand_bit_for_bit(kind):
    net, x, weighted = nn.Linear(4, 3), leaf(6, 4), Weighted(W)
    with torch.autocast("cpu", kind):
        by_hand = (W[Y] * F.cross_entropy(net(x), Y, reduction="none")).mean()
        got = weighted(lambda: F.cross_entropy(net(x), Y))
    assert torch.equal(got, by_hand)
    assert got.dtype == by_hand.dtype


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_loss_inside_of_a_checkpoint_is_never_trained_without_its_weights(reentrant):
    """Its second computation comes with the backward pass, after the step."""
    x, weighted = leaf(6, 3), Weighted(W)

    def step():
        return checkpoint(lambda z: F.cross_entropy(z * 1.0, Y), x, use_reentrant=reentrant)

    loss = weighted.once(step)
    if weighted.weights.hits:
        with pytest.raises(CheckpointError):
            loss.backward()
    else:  # a step without hits is refused
        assert torch.equal(loss, F.cross_entropy(x, Y))
    # a network inside of one is what it is for
    around_the_network = weighted.once(lambda: F.cross_entropy(checkpoint(torch.abs, x, use_reentrant=False), Y))
    by_hand = (W[Y] * F.cross_entropy(x.abs(), Y, reduction="none")).mean()
    assert torch.equal(around_the_network, by_hand)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: nn.CrossEntropyLoss()(x, Y),
        lambda x: nn.CrossEntropyLoss(label_smoothing=0.1)(x, Y),
        lambda x: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0]))(x, Y),
        lambda x: nn.CrossEntropyLoss(reduction="sum")(x, Y),
        lambda x: nn.CrossEntropyLoss(ignore_index=1)(x, Y),
        lambda x: nn.CrossEntropyLoss(ignore_index=-1)(x, Y - 1),
        lambda x: nn.NLLLoss()(x.log_softmax(1), Y),
        lambda x: F.nll_loss(x.log_softmax(1), Y),
        lambda x: F.cross_entropy(x, Y, reduce=False).sum(),
        lambda x: F.cross_entropy(x[:, :, None], Y[:, None]),
        lambda x: F.cross_entropy(x, Y.int().long()),
        lambda x: F.cross_entropy(x.double(), Y),
        lambda x: F.cross_entropy(x, F.one_hot(Y, 3).float()),
    ],
    ids=range(13),
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_the_quick_way_is_only_quicker(call):
    x, weighted = leaf(6, 3), Weighted(W)
    weighted.once(lambda: F.cross_entropy(x, Y))
    assert weighted.weights.quick is not None
    quick = weighted.once(lambda: call(x))
    assert torch.equal(quick, Weighted(W).once(lambda: call(x)))
    assert weighted.weights.hits == 1


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_the_deprecated_booleans():
    x = leaf(6, 3)
    losses = W[Y] * F.cross_entropy(x, Y, reduction="none")
    assert torch.equal(Weighted(W)(lambda: F.cross_entropy(x, Y, size_average=False)), losses.sum())
    assert torch.equal(Weighted(W)(lambda: F.cross_entropy(x, Y, reduce=False)), losses)


def test_ignored_targets_have_no_weight_and_do_not_count():
    x, y = leaf(6, 3), torch.tensor([0, -100, 2, 1, -100, 2])
    keep = y >= 0
    by_hand = (W[y[keep]] * F.cross_entropy(x[keep], y[keep], reduction="none")).mean()
    assert torch.allclose(Weighted(W)(lambda: F.cross_entropy(x, y)), by_hand)
    batch = Weighted(W, normalize="batch")(lambda: F.cross_entropy(x, y))
    assert torch.allclose(batch, F.cross_entropy(x, y, weight=W))
    # also where a class is ignored
    by_class = Weighted(W)(lambda: F.cross_entropy(x, Y, ignore_index=1))
    kept = Y != 1
    assert torch.allclose(by_class, (W[Y[kept]] * F.cross_entropy(x[kept], Y[kept], reduction="none")).mean())
    samples = Weighted(samples=1, batch=(None, SAMPLES))(lambda: F.cross_entropy(x, y))
    assert torch.allclose(samples, (SAMPLES * F.cross_entropy(x, y, reduction="none")).sum() / 4)


def test_label_smoothing_and_the_users_own_class_weights_stay():
    x, own = leaf(6, 3), torch.tensor([1.0, 5.0, 2.0])
    smooth = Weighted(W)(lambda: F.cross_entropy(x, Y, label_smoothing=0.1))
    assert torch.allclose(smooth, (W[Y] * F.cross_entropy(x, Y, reduction="none", label_smoothing=0.1)).mean())
    both = Weighted(W)(lambda: F.cross_entropy(x, Y, weight=own))
    losses = W[Y] * F.cross_entropy(x, Y, weight=own, reduction="none")
    assert torch.allclose(both, losses.sum() / own[Y].sum())


@pytest.mark.parametrize("normalize", ["none", "batch"])
def test_soft_targets_are_weighted_by_class(normalize):
    x, p = leaf(6, 3), torch.rand(6, 3).softmax(1)
    by_hand = -(W * p * x.log_softmax(1)).sum(1)
    by_hand = by_hand.mean() if normalize == "none" else by_hand.sum() / (p @ W).sum()
    assert torch.allclose(Weighted(W, normalize=normalize)(lambda: F.cross_entropy(x, p)), by_hand)
    hard = Weighted(W, normalize=normalize)(lambda: F.cross_entropy(x, F.one_hot(Y, 3).float()))
    assert torch.allclose(hard, Weighted(W, normalize=normalize)(lambda: F.cross_entropy(x, Y)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_segmentation_is_weighted_by_pixel(layout):
    x = leaf(2, 3, 4, 5).to(memory_format=layout)
    y = torch.randint(3, (2, 4, 5))
    y[0, 0, 0] = -100
    losses = F.cross_entropy(x, y, reduction="none")
    w = torch.where(y >= 0, W[y.clamp(min=0)], 0)
    assert torch.allclose(Weighted(W)(lambda: F.cross_entropy(x, y)), (w * losses).sum() / 39)
    per_image = Weighted(samples=1, batch=(None, torch.tensor([2.0, 0.5])))(lambda: F.cross_entropy(x, y))
    assert torch.allclose(per_image, (torch.tensor([2.0, 0.5])[:, None, None] * losses).sum() / 39)
    masks, target = leaf(2, 1, 4, 5), torch.randint(2, (2, 1, 4, 5)).float()
    by_hand = (
        torch.tensor([0.5, 3.0])[target.long()] * F.binary_cross_entropy_with_logits(masks, target, reduction="none")
    ).mean()
    got = Weighted([0.5, 3.0])(lambda: F.binary_cross_entropy_with_logits(masks, target))
    assert torch.allclose(got, by_hand)


def test_class_and_sample_weights_multiply():
    x = leaf(6, 3)
    got = Weighted(W, samples=1, batch=(None, SAMPLES))(lambda: F.cross_entropy(x, Y))
    assert torch.allclose(got, (W[Y] * SAMPLES * F.cross_entropy(x, Y, reduction="none")).mean())


def test_one_sample_without_a_batch_dimension():
    x = leaf(3)
    got = Weighted(W)(lambda: F.cross_entropy(x, torch.tensor(2)))
    assert torch.allclose(got, 3 * F.cross_entropy(x, torch.tensor(2)))


def test_an_empty_batch_is_what_torch_makes_of_it():
    x, y = leaf(0, 3), torch.zeros(0, dtype=torch.long)
    assert torch.isnan(F.cross_entropy(x, y))
    assert torch.isnan(Weighted(W)(lambda: F.cross_entropy(x, y)))
    assert float(Weighted(W)(lambda: F.cross_entropy(x, y, reduction="sum")).detach()) == 0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_type_of_the_loss_stays(kind):
    x = leaf(6, 3).detach().to(kind).requires_grad_()
    plain, got = F.cross_entropy(x, Y), Weighted(W)(lambda: F.cross_entropy(x, Y))
    assert got.dtype == plain.dtype
    by_hand = (W[Y].double() * F.cross_entropy(x.double(), Y, reduction="none")).mean()
    assert float(got.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-2)
    got.backward()
    assert x.grad.dtype == kind


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_the_scale_of_the_weights_does_not_matter_where_they_are_normalised(scale):
    x = leaf(6, 3, kind=torch.float64)
    one, other = (Weighted(w, normalize="batch")(lambda: F.cross_entropy(x, Y)) for w in (W, scale * W))
    assert torch.allclose(one, other)


def test_weights_of_zero_everywhere_in_a_batch_give_zero_not_nan():
    x = leaf(6, 3)
    got = Weighted(samples=1, batch=(None, torch.zeros(6)), normalize="batch")(lambda: F.cross_entropy(x, Y))
    got.backward()
    assert float(got.detach()) == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_what_trains_nothing_is_left_alone():
    x = leaf(6, 3)
    weighted = Weighted(W)
    plain = F.cross_entropy(x.detach(), Y)
    assert torch.equal(weighted(lambda: F.cross_entropy(x.detach(), Y)), plain)
    with torch.no_grad():
        assert torch.equal(weighted(lambda: F.cross_entropy(x, Y)), plain)
    assert weighted.weights.hits == 0


# -- which losses ------------------------------------------------------------------------------------------------------


def two_losses(x):
    return F.cross_entropy(x, Y) + F.mse_loss(x, torch.zeros_like(x))


def test_several_losses_must_be_told_apart():
    x = leaf(6, 3)
    with pytest.raises(InvalidArgument, match=r"2 losses that train: cross_entropy, mse_loss\. .*match='all'"):
        Weighted(W, batch=(None, Y))(lambda: two_losses(x))
    ce = (W[Y] * F.cross_entropy(x, Y, reduction="none")).mean()
    mse = (W[Y][:, None] * x.square()).mean()
    for match, expected in {
        "all": ce + mse,
        "first": ce + x.square().mean(),
        "cross_entropy": ce + x.square().mean(),
        "mse_loss": F.cross_entropy(x, Y) + mse,
    }.items():
        got = Weighted(W, match=match, batch=(None, Y))(lambda: two_losses(x))
        assert torch.allclose(got, expected)


def test_a_loss_that_is_only_logged_does_not_count():
    x = leaf(6, 3)
    got = Weighted(W)(lambda: (F.cross_entropy(x.detach(), Y), F.cross_entropy(x, Y))[1])
    assert torch.allclose(got, (W[Y] * F.cross_entropy(x, Y, reduction="none")).mean())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [lambda x: F.cross_entropy(x, Y), lambda x: F.nll_loss(x, Y)])
def test_a_wrong_number_of_weights_names_both(step):
    x = leaf(6, 3)
    with pytest.raises(ShapeMismatch, match="4 class weights and 3 logits"):
        Weighted([1.0, 2.0, 3.0, 4.0])(lambda: step(x))
    with pytest.raises(ShapeMismatch, match="2 class weights and 3 logits"):
        Weighted([1.0, 2.0])(lambda: F.cross_entropy(x, torch.rand(6, 3).softmax(1)))


def test_a_label_beyond_the_weights_is_named():
    x = leaf(6, 3)
    with pytest.raises(InvalidArgument, match="the label 7"):
        Weighted(W)(lambda: F.cross_entropy(x, torch.tensor([0, 1, 7, 1, 0, 2])))
    with pytest.raises(InvalidArgument, match="the label -1"):
        Weighted(W)(lambda: F.cross_entropy(x, torch.tensor([0, 1, -1, 1, 0, 2])))
    with pytest.raises(InvalidArgument, match="the label 5"):
        Weighted(W, batch=(None, torch.tensor([0, 1, 5, 1, 0, 2])))(lambda: F.mse_loss(x, torch.zeros(6, 3)))


def test_class_weights_need_classes():
    x = leaf(6, 3)
    with pytest.raises(BatchFormat, match="labels="):
        Weighted(W, batch=(None, torch.zeros(6, 3)))(lambda: F.mse_loss(x, torch.zeros(6, 3)))
    multilabel = torch.randint(2, (6, 3)).float()
    with pytest.raises(BatchFormat, match="sample_weights="):
        Weighted(W, batch=(None, multilabel))(lambda: F.binary_cross_entropy_with_logits(x, multilabel))


@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0, -1, 1, 1, 1, 1]), torch.full((6,), math.nan), torch.tensor([math.inf] * 6)]
)
def test_bad_weights_in_a_batch(bad):
    x = leaf(6, 3)
    with pytest.raises(InvalidArgument, match="at least 0"):
        Weighted(samples=1, batch=(None, bad))(lambda: F.cross_entropy(x, Y))


def test_weights_that_do_not_fit_the_losses():
    x = leaf(6, 3)
    with pytest.raises(ShapeMismatch, match=r"\(3,\) for losses of shape \(6,\)"):
        Weighted(samples=1, batch=(None, torch.ones(3)))(lambda: F.cross_entropy(x, Y))
    with pytest.raises(BatchFormat, match="sample_weights='weight'"):
        Weighted(samples="weight", batch={"x": x})(lambda: F.cross_entropy(x, Y))
    with pytest.raises(BatchFormat, match="tensor is needed"):
        Weighted(samples=1, batch=(None, [1.0] * 6))(lambda: F.cross_entropy(x, Y))


def test_batch_normalisation_of_one_sample():
    x = leaf(1, 3)
    with pytest.raises(InvalidArgument, match="one sample: its weight cancels"):
        Weighted(W, normalize="batch")(lambda: F.cross_entropy(x, Y[:1]))


# -- modules of somebody else ------------------------------------------------------------------------------------------


class OwnLoss(nn.Module):
    """A loss that no function of torch computes."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, z, target):
        losses = -z.log_softmax(1).gather(1, target[:, None])[:, 0]
        return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[self.reduction]()


class WithFunction(OwnLoss):
    """One that uses a function of torch inside, which must not be weighted twice."""

    def forward(self, z, target):
        return F.cross_entropy(z, target, reduction=self.reduction)


@pytest.mark.parametrize("kind", [OwnLoss, WithFunction])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_module_is_weighted_as_a_whole(kind, reduction):
    x, module, weighted = leaf(6, 3), kind(reduction), Weighted(W, batch=(None, Y))
    losses = W[Y] * OwnLoss("none")(x, Y)
    functions = LossInterception(weighted.weights)
    weighted.weights.begin((None, Y))
    hook = ModuleInterception(module, weighted.weights, functions)
    weighted.stand_ins.put_in_place()
    with functions:
        got = module(x, Y)
    weighted.stand_ins.put_back()
    hook.remove()
    assert torch.allclose(got, {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]())
    assert weighted.weights.hits == 1
    assert (module.reduction, functions.suspended, len(module._forward_hooks)) == (reduction, 0, 0)


def test_a_loss_module_that_raises_keeps_its_reduction():
    module, weighted = OwnLoss(), Weighted(W)
    weighted.weights.begin(None)
    hook = ModuleInterception(module, weighted.weights, None)
    with pytest.raises(IndexError):
        module(leaf(6, 3), torch.tensor(5))
    hook.remove()
    assert module.reduction == "mean"
