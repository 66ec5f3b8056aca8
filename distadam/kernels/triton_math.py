"""The rules' mathematics as Triton device functions: the operations of `distadam.rules`, in the same order.

[Note: one rounding per operation, on the device]
    `distadam/rules/rule.py` says why rules use only operations that round once by IEEE 754. Here that takes three
    things: `tl.div_rn` and `tl.sqrt_rn` (plain `/` is an approximation on CUDA), every kernel launched with
    `enable_fp_fusion=False` (else ptxas turns a product and a sum into one fused multiply-add), and no `tl.fma` but
    where the exact error of a product is wanted. The results are then those of the reference kernel bit for bit, but
    for the square root: the reference takes 1 / (1 / sqrt(x)) on the CPU ([Note: square roots on the CPU] there), which
    may differ from the IEEE root by an ulp or two.

[Note: coefficients]
    What depends on the group and the step alone (bias corrections, products of hyper-parameters) is computed once per
    row by a kernel of one program a row, in double precision, and rounded once to float32: the order of operations is
    that of the rules. The powers of the betas are taken by squaring in double-double arithmetic (relative error below
    count * 2**-104), so they are the correctly rounded ones but for one in billions; C's `pow`, which the reference
    calls, is within 1 ulp of those.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUM_HYPER = tl.constexpr(8)
"""Columns of the float64 table of hyper-parameters, one line per parameter group."""

NUM_COEFFICIENTS = tl.constexpr(8)
"""Columns of the float32 table of coefficients, one line per row (a range of slots with one group and step count)."""

COUNT = tl.constexpr(7)
"""The column that holds the step count itself, which random bits depend on."""

NUM_BITS = tl.constexpr(25)
"""A float32 step count stops at 2**24."""


OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
"""Of the kernels that compute coefficients."""


@triton.jit
def _product(a, a_low, b, b_low):
    """Multiply two double-doubles."""
    high = a * b
    low = tl.fma(a, b, -high) + (a * b_low + a_low * b)
    total = high + low
    return total, low - (total - high)


@triton.jit
def power(base, count):
    """Return base ** count in float64, for a whole count >= 0 (see [Note: coefficients])."""
    bits = count.to(tl.int32)
    square, square_low = base, base * 0.0
    result, result_low = base * 0.0 + 1.0, base * 0.0
    for _ in range(NUM_BITS):
        more, more_low = _product(result, result_low, square, square_low)
        odd = bits & 1 == 1
        result, result_low = tl.where(odd, more, result), tl.where(odd, more_low, result_low)
        square, square_low = _product(square, square_low, square, square_low)
        bits = bits >> 1
    return result + result_low


@triton.jit
def load_factor(factor):
    """Return the factor that a pointer, or None, stands for."""
    value = 1.0
    if factor is not None:
        value = tl.load(factor)
    return value


@triton.jit
def scaled(grad, num_ranks, multiplier0, multiplier1, loss_scale, factors, MAXIMIZE: tl.constexpr):
    """Turn the summed gradient into the one that the rule sees: `GradScaling`, factor by factor.

    The pointers say which factors there are; their values were loaded before.
    """
    if num_ranks is not None:
        grad = tl.div_rn(grad, factors[0])
    if multiplier0 is not None:
        grad = grad * factors[1]
    if multiplier1 is not None:
        grad = grad * factors[2]
    if loss_scale is not None:
        grad = tl.div_rn(grad, factors[3])
    if MAXIMIZE:
        grad = -grad
    return grad


@triton.jit
def _with_weight_decay(grad, weight, weight_decay):
    """Add the gradient of an L2 penalty, unless weight_decay is 0: 0 * inf would be NaN and -0.0 + 0.0 is 0.0."""
    return tl.where(weight_decay != 0.0, grad + weight * weight_decay, grad)


@triton.jit
def _ewa(average, x, decay, gain):
    return average * decay + x * gain


@triton.jit
def _ewa_of_square(average, x, decay, gain):
    return average * decay + (x * gain) * x


@triton.jit
def adam_coefficients(coefficients, rows, hyper, steps, DECOUPLED: tl.constexpr):
    """Write beta1, 1 - beta1, beta2, 1 - beta2, the weight decay's factor, -step_size and eps of one row.

    Columns of hyper: lr, beta1, beta2, eps, weight_decay.
    """
    row = tl.program_id(0)
    group = hyper + tl.load(rows + 2 * row) * NUM_HYPER
    count = tl.load(steps + tl.load(rows + 2 * row + 1))
    lr, beta1, beta2 = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    eps, weight_decay = tl.load(group + 3), tl.load(group + 4)
    correction1 = 1.0 - power(beta1, count)
    correction2_sqrt = tl.sqrt(1.0 - power(beta2, count))
    step_size = lr / correction1 * correction2_sqrt
    factor = weight_decay
    if DECOUPLED:
        factor = tl.where(weight_decay != 0.0, 1.0 - lr * weight_decay, 1.0)
    out = coefficients + row * NUM_COEFFICIENTS
    tl.store(out, beta1.to(tl.float32))
    tl.store(out + 1, (1.0 - beta1).to(tl.float32))
    tl.store(out + 2, beta2.to(tl.float32))
    tl.store(out + 3, (1.0 - beta2).to(tl.float32))
    tl.store(out + 4, factor.to(tl.float32))
    tl.store(out + 5, (-step_size).to(tl.float32))
    tl.store(out + 6, (eps * correction2_sqrt).to(tl.float32))
    tl.store(out + COUNT, count)


@triton.jit
def adam(weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, row, DECOUPLED: tl.constexpr, AMSGRAD: tl.constexpr):
    """Return weight, exp_avg, exp_avg_sq, max_exp_avg_sq; see `rules.Adam`. row: what `adam_coefficients` wrote."""
    if DECOUPLED:
        weight = weight * row[4]
    else:
        grad = _with_weight_decay(grad, weight, row[4])
    exp_avg = _ewa(exp_avg, grad, row[0], row[1])
    exp_avg_sq = _ewa_of_square(exp_avg_sq, grad, row[2], row[3])
    second = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        second = max_exp_avg_sq
    denominator = tl.sqrt_rn(second) + row[6]
    weight = weight + tl.div_rn(exp_avg * row[5], denominator)
    return weight, exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def sgd_coefficients(coefficients, rows, hyper, steps, MOMENTUM: tl.constexpr):
    """Write momentum, 1 - dampening, weight_decay, -lr, and whether this is the first step, of one row.

    Columns of hyper: lr, momentum, dampening, weight_decay.
    """
    row = tl.program_id(0)
    group = hyper + tl.load(rows + 2 * row) * NUM_HYPER
    count = tl.load(steps + tl.load(rows + 2 * row + 1))
    out = coefficients + row * NUM_COEFFICIENTS
    if MOMENTUM:
        first = count == 1.0
        tl.store(out, tl.load(group + 1).to(tl.float32))
        tl.store(out + 1, (1.0 - tl.load(group + 2)).to(tl.float32))
        tl.store(out + 4, first.to(tl.float32))
    tl.store(out + 2, tl.load(group + 3).to(tl.float32))
    tl.store(out + 3, (-tl.load(group)).to(tl.float32))
    tl.store(out + COUNT, count)


@triton.jit
def sgd(weight, grad, buffer, row, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):
    """Return weight and momentum_buffer; see `rules.Sgd`. row: what `sgd_coefficients` wrote."""
    grad = _with_weight_decay(grad, weight, row[2])
    direction = grad
    if MOMENTUM:
        buffer = tl.where(row[4] != 0.0, grad, buffer * row[0] + grad * row[1])
        direction = buffer
        if NESTEROV:
            direction = grad + buffer * row[0]
    return weight + direction * row[3], buffer


@triton.jit
def rmsprop_coefficients(coefficients, rows, hyper, steps):
    """Write alpha, 1 - alpha, weight_decay, eps, momentum and -lr of one row.

    Columns of hyper: lr, alpha, eps, weight_decay, momentum.
    """
    row = tl.program_id(0)
    group = hyper + tl.load(rows + 2 * row) * NUM_HYPER
    alpha = tl.load(group + 1)
    out = coefficients + row * NUM_COEFFICIENTS
    tl.store(out, alpha.to(tl.float32))
    tl.store(out + 1, (1.0 - alpha).to(tl.float32))
    tl.store(out + 2, tl.load(group + 3).to(tl.float32))
    tl.store(out + 3, tl.load(group + 2).to(tl.float32))
    tl.store(out + 4, tl.load(group + 4).to(tl.float32))
    tl.store(out + 5, (-tl.load(group)).to(tl.float32))
    tl.store(out + COUNT, tl.load(steps + tl.load(rows + 2 * row + 1)))


@triton.jit
def rmsprop(weight, grad, square_avg, buffer, grad_avg, row, MOMENTUM: tl.constexpr, CENTERED: tl.constexpr):
    """Return weight, square_avg, momentum_buffer, grad_avg; see `rules.RmsProp`. row: of `rmsprop_coefficients`."""
    grad = _with_weight_decay(grad, weight, row[2])
    square_avg = _ewa_of_square(square_avg, grad, row[0], row[1])
    variance = square_avg
    if CENTERED:
        grad_avg = _ewa(grad_avg, grad, row[0], row[1])
        variance = square_avg - grad_avg * grad_avg
    denominator = tl.sqrt_rn(variance) + row[3]
    if MOMENTUM:
        buffer = buffer * row[4] + tl.div_rn(grad, denominator)
        weight = weight + buffer * row[5]
    else:
        weight = weight + tl.div_rn(grad * row[5], denominator)
    return weight, square_avg, buffer, grad_avg
