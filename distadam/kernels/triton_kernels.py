"""One kernel a rule: load -> scale -> update -> store, each number read once and written once.

[Note: chunks]
    A launch covers every range of a bucket's shard that has the same structure (the same states; the values of
    hyper-parameters do not matter). Program i updates the elements of line i of the chunk table: [start, numel, row],
    start and numel in units of 64 elements, at most `BLOCK` of them, inside one range; row is its line in the table of
    coefficients. So neither groups nor gaps nor parameters cost a launch, and nothing that changes from step to step
    is an argument: a CUDA graph replays the launch under any schedule.

[Note: width of accesses]
    A thread holds 8 neighbouring elements: 128 bits of a 16-bit type, twice that of float32 (loaded as two, stored in
    turn by 4), 64 bits of an 8-bit one. Units of 64 elements in the table are what tells the compiler that chunks and
    masks are aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distadam.kernels.triton_math import NUM_COEFFICIENTS, adam, load_factor, rmsprop, scaled, sgd
from distadam.kernels.triton_storage import WIDTH, load_gradient, load_moment, load_weight, store_moment, store_weight

BLOCK = 1024
"""Elements a program."""

UNIT = tl.constexpr(64)
"""Elements a unit of the chunk table: `layout` aligns slots to as many."""

NUM_COLUMNS = tl.constexpr(3)
"""Columns of the chunk table."""

OPTIONS = {"num_warps": 4, "maxnreg": 96, "enable_fp_fusion": False}
"""Where ptxas is left alone, its own choice of registers spills in some kernel; none needs more than this."""


@triton.jit
def _chunk(chunks, found_inf, BLOCK: tl.constexpr):
    """Return this program's chunk, and its row.

    A chunk is offsets and mask, shape (BLOCK / 256, 256), and the same of its blocks of 256, shape (BLOCK / 256, 1).
    Where found_inf is not 0 the masks are empty: nothing is read and nothing written.
    """
    line = chunks + tl.program_id(0) * NUM_COLUMNS
    start = tl.load(line).to(tl.int64) * UNIT
    numel = tl.load(line + 1) * UNIT
    if found_inf is not None:
        numel = tl.where(tl.load(found_inf) != 0.0, 0, numel)
    blocks = tl.arange(0, BLOCK // WIDTH)[:, None]
    inside = blocks * WIDTH + tl.arange(0, WIDTH)[None, :]
    return (start + inside, inside < numel, start // WIDTH + blocks, blocks * WIDTH < numel), tl.load(line + 2)


@triton.jit
def _factors(num_ranks, multiplier0, multiplier1, loss_scale):
    return load_factor(num_ranks), load_factor(multiplier0), load_factor(multiplier1), load_factor(loss_scale)


@triton.jit
def _row(coefficients, row):
    """Return a row of coefficients as scalars."""
    line = coefficients + row * NUM_COEFFICIENTS
    return (
        tl.load(line),
        tl.load(line + 1),
        tl.load(line + 2),
        tl.load(line + 3),
        tl.load(line + 4),
        tl.load(line + 5),
        tl.load(line + 6),
        tl.load(line + 7),
    )


@triton.jit
def adam_kernel(
    grad,
    param,
    extra,
    weight_keys,
    exp_avg,
    exp_avg_scale,
    exp_avg_keys,
    exp_avg_sq,
    exp_avg_sq_scale,
    exp_avg_sq_keys,
    max_exp_avg_sq,
    max_exp_avg_sq_scale,
    max_exp_avg_sq_keys,
    lanes,
    chunks,
    coefficients,
    num_ranks,
    multiplier0,
    multiplier1,
    loss_scale,
    found_inf,
    WEIGHTS: tl.constexpr,
    MOMENTS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adam, AdamW, AMSGrad."""
    chunk, line = _chunk(chunks, found_inf, BLOCK)
    row = _row(coefficients, line)
    factors = _factors(num_ranks, multiplier0, multiplier1, loss_scale)
    g = load_gradient(grad, chunk)
    w = load_weight(param, extra, chunk, WEIGHTS)
    m = load_moment(exp_avg, exp_avg_scale, chunk, True, MOMENTS)
    v = load_moment(exp_avg_sq, exp_avg_sq_scale, chunk, False, MOMENTS)
    v_max = v
    if AMSGRAD:
        v_max = load_moment(max_exp_avg_sq, max_exp_avg_sq_scale, chunk, False, MOMENTS)
    g = scaled(g, num_ranks, multiplier0, multiplier1, loss_scale, factors, MAXIMIZE)
    w, m, v, v_max = adam(w, g, m, v, v_max, row, DECOUPLED, AMSGRAD)
    store_moment(exp_avg, exp_avg_scale, exp_avg_keys, lanes, chunk, row, m, True, MOMENTS)
    store_moment(exp_avg_sq, exp_avg_sq_scale, exp_avg_sq_keys, lanes, chunk, row, v, False, MOMENTS)
    if AMSGRAD:
        store_moment(
            max_exp_avg_sq, max_exp_avg_sq_scale, max_exp_avg_sq_keys, lanes, chunk, row, v_max, False, MOMENTS
        )
    store_weight(param, extra, weight_keys, lanes, chunk, row, w, WEIGHTS)


@triton.jit
def sgd_kernel(
    grad,
    param,
    extra,
    weight_keys,
    momentum_buffer,
    momentum_buffer_scale,
    momentum_buffer_keys,
    lanes,
    chunks,
    coefficients,
    num_ranks,
    multiplier0,
    multiplier1,
    loss_scale,
    found_inf,
    WEIGHTS: tl.constexpr,
    MOMENTS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SGD, with momentum and Nesterov momentum."""
    chunk, line = _chunk(chunks, found_inf, BLOCK)
    row = _row(coefficients, line)
    factors = _factors(num_ranks, multiplier0, multiplier1, loss_scale)
    g = load_gradient(grad, chunk)
    w = load_weight(param, extra, chunk, WEIGHTS)
    buffer = w
    if MOMENTUM:
        buffer = load_moment(momentum_buffer, momentum_buffer_scale, chunk, True, MOMENTS)
    g = scaled(g, num_ranks, multiplier0, multiplier1, loss_scale, factors, MAXIMIZE)
    w, buffer = sgd(w, g, buffer, row, MOMENTUM, NESTEROV)
    if MOMENTUM:
        store_moment(
            momentum_buffer, momentum_buffer_scale, momentum_buffer_keys, lanes, chunk, row, buffer, True, MOMENTS
        )
    store_weight(param, extra, weight_keys, lanes, chunk, row, w, WEIGHTS)


@triton.jit
def rmsprop_kernel(
    grad,
    param,
    extra,
    weight_keys,
    square_avg,
    square_avg_scale,
    square_avg_keys,
    momentum_buffer,
    momentum_buffer_scale,
    momentum_buffer_keys,
    grad_avg,
    grad_avg_scale,
    grad_avg_keys,
    lanes,
    chunks,
    coefficients,
    num_ranks,
    multiplier0,
    multiplier1,
    loss_scale,
    found_inf,
    WEIGHTS: tl.constexpr,
    MOMENTS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CENTERED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """RMSprop: plain, centered, with momentum."""
    chunk, line = _chunk(chunks, found_inf, BLOCK)
    row = _row(coefficients, line)
    factors = _factors(num_ranks, multiplier0, multiplier1, loss_scale)
    g = load_gradient(grad, chunk)
    w = load_weight(param, extra, chunk, WEIGHTS)
    v = load_moment(square_avg, square_avg_scale, chunk, False, MOMENTS)
    buffer = v
    mean = v
    if MOMENTUM:
        buffer = load_moment(momentum_buffer, momentum_buffer_scale, chunk, True, MOMENTS)
    if CENTERED:
        mean = load_moment(grad_avg, grad_avg_scale, chunk, True, MOMENTS)
    g = scaled(g, num_ranks, multiplier0, multiplier1, loss_scale, factors, MAXIMIZE)
    w, v, buffer, mean = rmsprop(w, g, v, buffer, mean, row, MOMENTUM, CENTERED)
    store_moment(square_avg, square_avg_scale, square_avg_keys, lanes, chunk, row, v, False, MOMENTS)
    if MOMENTUM:
        store_moment(
            momentum_buffer, momentum_buffer_scale, momentum_buffer_keys, lanes, chunk, row, buffer, True, MOMENTS
        )
    if CENTERED:
        store_moment(grad_avg, grad_avg_scale, grad_avg_keys, lanes, chunk, row, mean, True, MOMENTS)
    store_weight(param, extra, weight_keys, lanes, chunk, row, w, WEIGHTS)
