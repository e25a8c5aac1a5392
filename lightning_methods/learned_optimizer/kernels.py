"""The step as Triton kernels: one program a block of one tensor, all tensors of a model in one launch.

This module imports Triton; nothing imports it before a step on a GPU. Tensors are reached by a table of addresses:
those of each parameter, gradient, momenta, and second moment where the guard mixes in Adam's step. Sums over a tensor
are added up in float64, in which the order of the blocks is lost in rounding to float32.
"""

# mypy: disable-error-code="no-untyped-def"
# what a kernel is given is typed by Triton, at each launch

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BOUND: tl.constexpr = tl.constexpr(5.0)
ALL: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)  # what is no number stays none, as in torch


@triton.jit
def _sum_of_squares(to, x):
    """Add the sum of squares of a block to a float64 number; numbers whose squares leave float32 are made smaller."""
    factor = tl.where(tl.max(tl.abs(x), 0) > 1e15, 5.421010862427522e-20, 1.0)  # 2^-64
    y = x * factor
    wide = factor.to(tl.float64)
    tl.atomic_add(to, tl.sum(y * y, 0).to(tl.float64) / (wide * wide))


@triton.jit
def _place(table, blocks, BLOCK: tl.constexpr):
    """Return the tensor of this program, its elements, which of those exist, and the row of the table."""
    block = tl.program_id(0)
    tensor = tl.load(blocks + 2 * block)
    at = tl.load(blocks + 2 * block + 1) + tl.arange(0, BLOCK)
    row = table + 5 * tensor
    numel = tl.load(row + 3)
    return tensor, at, numel, row


@triton.jit
def advance(table, blocks, decays, sums, factor, P: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):
    """Move the momenta on, and add up the squares of the eight inputs of each tensor."""
    tensor, at, numel, row = _place(table, blocks, BLOCK)
    mask = at < numel
    parameter = tl.load(tl.load(row).to(tl.pointer_type(P)) + at, mask, other=0.0).to(tl.float32)
    gradient = tl.load(tl.load(row + 1).to(tl.pointer_type(G)) + at, mask, other=0.0).to(tl.float32) * factor
    momenta = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    _sum_of_squares(sums + 8 * tensor, gradient)
    _sum_of_squares(sums + 8 * tensor + 1, parameter)
    for k in tl.static_range(6):
        m = tl.load(momenta + k * numel + at, mask, other=0.0)
        decay = tl.load(decays + k)
        difference = m - gradient
        # as torch.lerp does it
        m = tl.where(decay < 0.5, gradient + decay * difference, m - (1 - decay) * difference)
        tl.store(momenta + k * numel + at, m, mask)
        _sum_of_squares(sums + 8 * tensor + 2 + k, m)


@triton.jit
def _mean(sums, count):
    return tl.load(sums) / count


@triton.jit
def _scale(mean_square, eps):
    return (1 / tl.sqrt(mean_square + eps)).to(tl.float32)


@triton.jit
def _ratio(mean_square, reference):
    """Return an input of a tensor that is free of scale: the log of the ratio of two root mean squares, over four."""
    return ((tl.log(mean_square + 1e-30) - tl.log(reference + 1e-30)) / 8).to(tl.float32)


@triton.jit
def move(
    table,
    blocks,
    sums,
    totals,
    first,
    signals,
    bias,
    last,
    shares,
    factor,
    size,
    limit,
    eps,
    adam_lr,
    correction,
    P: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    SIGNAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ADD: tl.constexpr,
    ADAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run the network and take its steps; with ADD only add up what the size of a normalised step depends on.

    Shapes:
        sums `(K, 8)` and totals `(K, 2)`, float64; first and signals `(H, 8)`, bias `(H,)`, last `(outputs, H + 1)`,
        shares `(K, 2)`: of the learned step, and what corrects Adam's second moment.
    """
    tensor, at, numel, row = _place(table, blocks, BLOCK)
    mask = at < numel
    parameters = tl.load(row).to(tl.pointer_type(P)) + at
    parameter = tl.load(parameters, mask, other=0.0).to(tl.float32)
    gradient = tl.load(tl.load(row + 1).to(tl.pointer_type(G)) + at, mask, other=0.0).to(tl.float32) * factor
    momenta = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + at
    count = numel.to(tl.float64)
    own = sums + 8 * tensor
    # eight inputs and their mean squares, by name: lists of tensors do not exist here
    s0, s1, s2, s3 = _mean(own, count), _mean(own + 1, count), _mean(own + 2, count), _mean(own + 3, count)
    s4, s5, s6, s7 = _mean(own + 4, count), _mean(own + 5, count), _mean(own + 6, count), _mean(own + 7, count)
    x0, x1 = gradient * _scale(s0, eps), parameter * _scale(s1, eps)
    x2 = tl.load(momenta, mask, other=0.0) * _scale(s2, eps)
    x3 = tl.load(momenta + numel, mask, other=0.0) * _scale(s3, eps)
    x4 = tl.load(momenta + 2 * numel, mask, other=0.0) * _scale(s4, eps)
    x5 = tl.load(momenta + 3 * numel, mask, other=0.0) * _scale(s5, eps)
    x6 = tl.load(momenta + 4 * numel, mask, other=0.0) * _scale(s6, eps)
    x7 = tl.load(momenta + 5 * numel, mask, other=0.0) * _scale(s7, eps)
    if SIGNAL:
        r0, r1, r2 = _ratio(s2, s0), _ratio(s3, s0), _ratio(s4, s0)
        r3, r4, r5 = _ratio(s5, s0), _ratio(s6, s0), _ratio(s7, s0)
        r6, r7 = (tl.log(s1 + 1e-6) / 4).to(tl.float32), (tl.log(count) / 10).to(tl.float32)
    direction = tl.zeros([BLOCK], tl.float32) + tl.load(last + H)
    exponent = tl.zeros([BLOCK], tl.float32) + tl.load(last + (H + 1) + H)
    third = tl.zeros([BLOCK], tl.float32)
    if NORMALIZE:
        third += tl.load(last + 2 * (H + 1) + H)
    for j in range(H):
        w = first + 8 * j
        z = tl.load(bias + j)
        if SIGNAL:
            v = signals + 8 * j
            z += r0 * tl.load(v) + r1 * tl.load(v + 1) + r2 * tl.load(v + 2) + r3 * tl.load(v + 3)
            z += r4 * tl.load(v + 4) + r5 * tl.load(v + 5) + r6 * tl.load(v + 6) + r7 * tl.load(v + 7)
        unit = z + x0 * tl.load(w) + x1 * tl.load(w + 1) + x2 * tl.load(w + 2) + x3 * tl.load(w + 3)
        unit += x4 * tl.load(w + 4) + x5 * tl.load(w + 5) + x6 * tl.load(w + 6) + x7 * tl.load(w + 7)
        unit = tl.maximum(unit, 0.0, propagate_nan=ALL)
        direction += unit * tl.load(last + j)
        exponent += unit * tl.load(last + (H + 1) + j)
        if NORMALIZE:
            third += unit * tl.load(last + 2 * (H + 1) + j)
    step = direction * tl.exp(exponent)
    if NORMALIZE:
        step += x4  # the momentum of decay 0.9
    if ADD:
        step = tl.where(mask, step, 0.0)
        tl.atomic_add(totals + 2 * tensor, tl.sum(step * step, 0).to(tl.float64))
        tl.atomic_add(totals + 2 * tensor + 1, tl.sum(tl.where(mask, third, 0.0), 0).to(tl.float64))
    else:
        if NORMALIZE:
            # size e^(5 tanh(x / 5)), and nothing moves without a gradient
            x = _mean(totals + 2 * tensor + 1, count) / BOUND
            bounded = BOUND * (1 - 2 / (tl.exp(2 * x) + 1))
            scale = tl.exp(bounded) * (s4 / (s4 + eps)) / tl.sqrt(_mean(totals + 2 * tensor, count) + 1e-8)
            step = step * scale.to(tl.float32)
        step = tl.maximum(step * size, -limit, propagate_nan=ALL)
        step = tl.minimum(step, limit, propagate_nan=ALL)
        if ADAM:
            share = tl.zeros([BLOCK], tl.float32) + tl.load(shares + 2 * tensor)
            corrected, own = tl.load(shares + 2 * tensor + 1), mask & (share < 1)
            seconds = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + at
            second = tl.load(seconds, own, other=0.0) * 0.999 + gradient * gradient * 0.001
            tl.store(seconds, second, own)
            ratio = tl.load(momenta + 2 * numel, mask, other=0.0) * correction / (tl.sqrt(second * corrected) + 1e-8)
            ratio = tl.minimum(tl.maximum(ratio, -1.0, propagate_nan=ALL), 1.0, propagate_nan=ALL)
            step = step * share + ratio * (1 - share) * adam_lr
        tl.store(parameters, (parameter - step).to(P), mask)
