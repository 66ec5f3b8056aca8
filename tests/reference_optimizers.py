"""What the tests of rules and kernels measure against.

Tables with an entry per rule (a test holds their keys to those of `RULES`): torch's class, the option combinations to
run, and an oracle. An oracle computes one step from given state in extended precision, from coefficients in Python
doubles as torch has them, and beside every value the sum S of the absolute values of its terms, which contract 2.3.1's
bound is relative to. Where a term is itself a rounded sum (g + weight_decay * w), its own absolute terms stand for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distadam import native
from distadam.kernels.compiled import disagreement

Array = NDArray[np.longdouble]
Options = dict[str, Any]

TORCH_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}

FUSED_RULES = ("adam", "adamw", "sgd")

CPU_KERNEL = "torch_fused" if native.obstacle() or disagreement() else "compiled"
"""What fp32 updates of `FUSED_RULES` take on the CPU: torch's operations where there was no C compiler."""


def _combinations(**choices: list[Any]) -> list[Options]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _sgd_is_allowed(options: Options) -> bool:
    return not options["nesterov"] or (options["momentum"] > 0 and options["dampening"] == 0)


_COMMON = {"lr": [3e-3], "maximize": [False, True], "weight_decay": [0.0, 0.03]}

OPTIONS: dict[str, list[Options]] = {
    "adam": [
        *_combinations(**_COMMON, amsgrad=[False, True], decoupled_weight_decay=[False, True]),
        {"lr": 1e-2, "betas": (0.3, 0.7), "eps": 1e-3},
    ],
    "adamw": [*_combinations(**_COMMON, amsgrad=[False, True]), {"lr": 1e-2, "betas": (0.0, 0.95)}],
    "sgd": [
        options
        for options in _combinations(**_COMMON, momentum=[0.0, 0.9], dampening=[0.0, 0.3], nesterov=[False, True])
        if _sgd_is_allowed(options)
    ],
    "rmsprop": [
        *_combinations(**_COMMON, momentum=[0.0, 0.9], centered=[False, True]),
        {"lr": 1e-2, "alpha": 0.4, "eps": 1e-3},
    ],
}


def options_id(options: Options) -> str:
    """Name a combination by what is not off."""
    return "-".join(f"{name}={value}" for name, value in options.items() if value) or "defaults"


def cases(names: tuple[str, ...] = tuple(OPTIONS)) -> list[tuple[str, Options]]:
    """List (rule name, options), for `pytest.mark.parametrize` with `case_id`."""
    return [(name, options) for name in names for options in OPTIONS[name]]


def case_id(value: object) -> str:
    """Name one parameter of a case."""
    return options_id(value) if isinstance(value, dict) else str(value)


def make_group(name: str, options: Options) -> Options:
    """Let torch itself make the param_group dict."""
    group = TORCH_OPTIMIZERS[name]([torch.zeros(1, requires_grad=True)], **options).param_groups[0]
    del group["params"]
    return group


@dataclass(slots=True, kw_only=True)
class Problem:
    """One update: its inputs, and the results once it has run in place.

    Attributes:
        weight: 1-D.
        grad: 1-D.
        state: The rule's states by name, 1-D.
        count: The number of this step, from 1.
    """

    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    count: int

    def clone(self) -> Problem:
        """Copy, so that one update does not see what another did."""
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        return Problem(weight=self.weight.clone(), grad=self.grad.clone(), state=state, count=self.count)

    def results(self) -> dict[str, Tensor]:
        """Everything that an update changes, by name."""
        return {"weight": self.weight, **self.state}


def make_problem(
    state_names: tuple[str, ...], count: int, *, numel: int = 4096, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Problem:
    """Draw an update: magnitudes over five decades, a quarter of the weights 0, states 0 at step 1.

    Weights of 0 leave the bound nothing but the update itself to be relative to.
    """
    generator = torch.Generator().manual_seed(1000 * seed + count)

    def draw() -> Tensor:
        exponent = torch.rand(numel, generator=generator, dtype=torch.float64) * 5 - 4
        return torch.randn(numel, generator=generator, dtype=torch.float64) * 10**exponent

    weight = draw()
    weight[torch.rand(numel, generator=generator) < 0.25] = 0
    state: dict[str, Tensor] = {}
    for name in state_names:
        is_square = "sq" in name
        state[name] = (
            torch.zeros(numel, dtype=dtype) if count == 1 else (draw() ** 2 if is_square else draw()).to(dtype)
        )
    # A run's mean square is not far below its squared mean (Cauchy-Schwarz). States that no run can reach, a large
    # mean over a small root mean square, would amplify the gradient's rounding by more than S accounts for, in torch
    # as well as here.
    for mean, mean_square in (("exp_avg", "exp_avg_sq"), ("grad_avg", "square_avg")):
        if mean in state:
            state[mean_square] += 2 * state[mean] ** 2
    return Problem(weight=weight.to(dtype), grad=draw().to(dtype), state=state, count=count)


def torch_step(name: str, group: Mapping[str, Any], problem: Problem, **implementation: bool) -> None:
    """Let torch.optim do the update in place, by the given implementation (`fused=True`, `foreach=False`, ...)."""
    parameter = torch.nn.Parameter(problem.weight)
    parameter.grad = problem.grad
    optimizer = TORCH_OPTIMIZERS[name]([parameter], lr=1e-3, **implementation)
    switches = ("foreach", "fused")
    optimizer.param_groups[0].update({key: value for key, value in group.items() if key not in switches})
    if name == "sgd":
        if problem.count > 1:
            optimizer.state[parameter] = problem.state
    else:
        step = torch.tensor(float(problem.count - 1))
        optimizer.state[parameter] = {"step": step, **problem.state}
    optimizer.step()
    if name == "sgd" and problem.state:
        problem.state["momentum_buffer"] = optimizer.state[parameter]["momentum_buffer"]


@dataclass(slots=True, kw_only=True)
class Exact:
    """A result in extended precision.

    Attributes:
        value: The result.
        scale: S, the sum of the absolute values of its terms.
    """

    value: Array
    scale: Array


Oracle = Callable[[Mapping[str, Any], Problem], dict[str, Exact]]


def _wide(tensor: Tensor) -> Array:
    return tensor.double().numpy().astype(np.longdouble)


def _gradient(group: Mapping[str, Any], problem: Problem, *, decoupled: bool) -> Exact:
    grad = _wide(problem.grad) * (-1 if group["maximize"] else 1)
    if decoupled or group["weight_decay"] == 0:
        return Exact(value=grad, scale=abs(grad))
    penalty = group["weight_decay"] * _wide(problem.weight)
    return Exact(value=grad + penalty, scale=abs(grad) + abs(penalty))


def _ewa(average: Array, x: Exact, decay: float, gain: float) -> Exact:
    return Exact(value=decay * average + gain * x.value, scale=decay * abs(average) + gain * x.scale)


def _square(x: Exact) -> Exact:
    return Exact(value=x.value**2, scale=x.scale**2)


def _adam(group: Mapping[str, Any], problem: Problem, *, decoupled: bool) -> dict[str, Exact]:
    (beta1, beta2), lr, weight_decay = map(float, group["betas"]), float(group["lr"]), float(group["weight_decay"])
    weight, grad = _wide(problem.weight), _gradient(group, problem, decoupled=decoupled)
    exp_avg = _ewa(_wide(problem.state["exp_avg"]), grad, beta1, 1 - beta1)
    exp_avg_sq = _ewa(_wide(problem.state["exp_avg_sq"]), _square(grad), beta2, 1 - beta2)
    results = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if group["amsgrad"]:
        before = _wide(problem.state["max_exp_avg_sq"])
        exp_avg_sq = Exact(value=np.maximum(before, exp_avg_sq.value), scale=np.maximum(abs(before), exp_avg_sq.scale))
        results["max_exp_avg_sq"] = exp_avg_sq
    denominator = np.sqrt(exp_avg_sq.value) / math.sqrt(1 - beta2**problem.count) + group["eps"]
    step_size = lr / (1 - beta1**problem.count) / denominator
    kept = 1 - lr * weight_decay if decoupled else 1.0
    results["weight"] = Exact(
        value=kept * weight - step_size * exp_avg.value, scale=abs(kept * weight) + step_size * exp_avg.scale
    )
    return results


def _adam_oracle(group: Mapping[str, Any], problem: Problem) -> dict[str, Exact]:
    return _adam(group, problem, decoupled=group["decoupled_weight_decay"])


def _adamw_oracle(group: Mapping[str, Any], problem: Problem) -> dict[str, Exact]:
    return _adam(group, problem, decoupled=True)


def _sgd_oracle(group: Mapping[str, Any], problem: Problem) -> dict[str, Exact]:
    lr, momentum = float(group["lr"]), group["momentum"]
    weight, direction = _wide(problem.weight), _gradient(group, problem, decoupled=False)
    results: dict[str, Exact] = {}
    if momentum != 0:
        grad = direction
        if problem.count == 1:
            buffer = grad
        else:
            buffer = _ewa(_wide(problem.state["momentum_buffer"]), grad, momentum, 1 - group["dampening"])
        results["momentum_buffer"] = direction = buffer
        if group["nesterov"]:
            direction = Exact(value=grad.value + momentum * buffer.value, scale=grad.scale + momentum * buffer.scale)
    results["weight"] = Exact(value=weight - lr * direction.value, scale=abs(weight) + lr * direction.scale)
    return results


def _rmsprop_oracle(group: Mapping[str, Any], problem: Problem) -> dict[str, Exact]:
    lr, alpha, momentum = float(group["lr"]), group["alpha"], group["momentum"]
    weight, grad = _wide(problem.weight), _gradient(group, problem, decoupled=False)
    square_avg = _ewa(_wide(problem.state["square_avg"]), _square(grad), alpha, 1 - alpha)
    results = {"square_avg": square_avg}
    radicand, condition = square_avg.value, np.ones_like(weight)
    if group["centered"]:
        grad_avg = _ewa(_wide(problem.state["grad_avg"]), grad, alpha, 1 - alpha)
        results["grad_avg"] = grad_avg
        radicand = square_avg.value - grad_avg.value**2
        # The radicand is a difference: its absolute terms, over itself, are what the quotient's error grows by (the
        # root halves it, but the quotient's other roundings are there as well).
        condition = (square_avg.scale + grad_avg.scale**2) / radicand
    denominator = np.sqrt(radicand) + group["eps"]
    quotient = Exact(value=grad.value / denominator, scale=condition * grad.scale / denominator)
    if momentum > 0:
        before = _wide(problem.state["momentum_buffer"])
        quotient = Exact(value=momentum * before + quotient.value, scale=momentum * abs(before) + quotient.scale)
        results["momentum_buffer"] = quotient
    results["weight"] = Exact(value=weight - lr * quotient.value, scale=abs(weight) + lr * quotient.scale)
    return results


ORACLES: dict[str, Oracle] = {
    "adam": _adam_oracle,
    "adamw": _adamw_oracle,
    "sgd": _sgd_oracle,
    "rmsprop": _rmsprop_oracle,
}


def worst_error(actual: Problem, exact: Mapping[str, Exact]) -> float:
    """Return the largest |error| / (eps * S) over all results and elements; the contract allows 4."""
    results = actual.results()
    assert set(results) == set(exact)
    eps = torch.finfo(actual.weight.dtype).eps
    return max(
        float(np.max(abs(_wide(tensor) - exact[name].value) / (eps * exact[name].scale)))
        for name, tensor in results.items()
    )


def worst_difference(actual: Problem, other: Problem, before: Problem, exact: Mapping[str, Exact]) -> float:
    """Return the largest |actual - other| / (eps * S) over all results, and all elements but some of the weight's.

    Two implementations that each keep a bound of 4 may differ by 8. A weight is compared where it is at least as large
    as its update, since there most of S is a term that both have without error.
    """
    results, other_results = actual.results(), other.results()
    assert set(results) == set(other_results) == set(exact)
    eps = torch.finfo(before.weight.dtype).eps
    worst = 0.0
    for name, tensor in results.items():
        ratio = abs(_wide(tensor) - _wide(other_results[name])) / (eps * exact[name].scale)
        if name == "weight":
            ratio = ratio[exact[name].scale <= 2 * abs(_wide(before.weight))]
        worst = max(worst, float(np.max(ratio)))
    return worst


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether every tensor has the same bits in both, signs of zero and NaN payloads included."""
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}
    return set(a) == set(b) and all(
        torch.equal(a[name].view(integer[a[name].dtype]), b[name].view(integer[b[name].dtype])) for name in a
    )


class OperationCounter(TorchDispatchMode):
    """Counts operations, and those that return a storage which none of their arguments has.

    Attributes:
        operations: Names of the operations that ran.
        allocating: Names of those whose output is new memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.allocating: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and compare storages."""
        kwargs = kwargs or {}
        before = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        self.operations.append(str(func))
        if any(isinstance(leaf, Tensor) and _storage(leaf) not in before for leaf in tree_leaves(result)):
            self.allocating.append(str(func))
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
