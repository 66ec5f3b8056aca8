"""`ShardedGradient`: what stands in ``p.grad`` while the gradient itself is collected, reduced and sharded.

Note [Where a gradient is]: loops look at ``p.grad``. With None there, clipping would do nothing without a word and
``GradScaler.update()`` would raise. So after a backward ``p.grad`` is a tensor subclass without memory, and the few
operations that loops apply to gradients are carried out on the shards, with the meaning they have on the averaged
gradient. Anything else raises: nothing computes on zeros that stand for a gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _foreach_utils

from distadam.errors import UsageError

aten = torch.ops.aten


class Operations(Protocol):
    """What stand-ins can do; see `GradientOperations`."""

    def collect(self, stand_in: ShardedGradient, grad: Tensor) -> None:
        """Add a contribution."""

    def zero(self, stand_ins: Sequence[ShardedGradient]) -> None:
        """Make gradients zero."""

    def norms(self, stand_ins: Sequence[ShardedGradient], order: float, dtype: torch.dtype | None) -> list[Tensor]:
        """Return global norms."""

    def scale(self, stand_ins: Sequence[ShardedGradient], factors: Sequence[Any], divide: bool) -> None:
        """Multiply or divide in place."""

    def apply(self, stand_ins: Sequence[ShardedGradient], function: Callable[[Tensor], Any]) -> None:
        """Apply an elementwise in-place function."""

    def check_finite(self, stand_ins: Sequence[ShardedGradient], found_inf: Tensor, inv_scale: Tensor) -> None:
        """Check and unscale for GradScaler."""


class ShardedGradient(Tensor):
    """A gradient that lives in shards: p's shape, dtype and device, no memory.

    That of a parameter which has just become trainable has no shards yet: it keeps what this rank contributes until
    the ranks next agree on something, and the parameter gets its place.

    Args:
        param: whose gradient this is.
        operations: carry out what is done to it.
        index: the parameter's place among all that have one; None: none yet.
        name: the parameter's.
    """

    _weak_operations: weakref.ref[Operations]
    param_index: int | None
    waiting: Tensor | None
    _name: str

    @staticmethod
    def __new__(cls, param: Tensor, operations: Operations, index: int | None, name: str) -> ShardedGradient:
        """Return the stand-in of ``param``."""
        stand_in: ShardedGradient = torch.Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )
        return stand_in

    def __init__(self, param: Tensor, operations: Operations, index: int | None, name: str) -> None:
        self._weak_operations = weakref.ref(operations)  # p.grad may outlive the optimizer
        self.param_index = index
        self.waiting = None
        self._name = name

    def hold(self, grad: Tensor) -> None:
        """Keep a contribution until the parameter has a place; 16-bit ones add up in float32."""
        if self.waiting is None:
            self.waiting = grad.detach().clone()
        else:
            wide = torch.promote_types(self.waiting.dtype, torch.float32)
            self.waiting = self.waiting.to(wide).add_(grad.detach())

    def belongs_to(self, operations: Operations) -> bool:
        """Say whether this optimizer's operations serve it."""
        return self._weak_operations() is operations

    @property
    def _operations(self) -> Operations:
        operations = self._weak_operations()
        if operations is None:
            raise UsageError(
                f"p.grad of parameter {self._name!r}: its optimizer is gone, and the gradient too. Set p.grad = None."
            )
        return operations

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedGradient({self._name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copy of a module has no gradient of its own yet."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out what loops do with gradients; refuse everything else."""
        handler = _HANDLERS.get(func) or _HANDLERS.get(getattr(func, "overloadpacket", None))
        if handler is not None:
            return handler(func, args, kwargs or {})
        values = [*args, *(kwargs or {}).values()]
        raise _refusal(func, next(item for item in _flat(values) if isinstance(item, ShardedGradient)))

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Raise where torch would not dispatch but crash, or say nothing of the parameter."""
        raise _refusal("this operation", self)

    numpy = __array__ = tolist = share_memory_ = __reduce_ex__ = _refuse


def _refusal(what: Any, stand_in: ShardedGradient) -> UsageError:
    return UsageError(
        f"{what} on p.grad of parameter {stand_in._name!r}: the gradient is sharded over ranks and has no memory "
        f"here. Use optimizer.full_grad({stand_in._name!r}) for a plain tensor; norms, clipping, in-place scaling, "
        "clamping, zero_() and GradScaler work on p.grad directly."
    )


def register_foreach() -> None:
    """Let torch's clipping take its one-call path for stand-ins, as torch does for DTensor."""
    if ShardedGradient not in _foreach_utils._foreach_supported_types:
        _foreach_utils._foreach_supported_types.append(ShardedGradient)  # type: ignore[arg-type]


def _flat(args: Sequence[Any]) -> list[Any]:
    return [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]


def _split(tensors: Sequence[Tensor]) -> tuple[list[int], list[ShardedGradient], list[int], list[Tensor]]:
    """Return positions and tensors of the stand-ins, then of the plain tensors."""
    at = [position for position, tensor in enumerate(tensors) if isinstance(tensor, ShardedGradient)]
    plain_at = [position for position, tensor in enumerate(tensors) if not isinstance(tensor, ShardedGradient)]
    stand_ins = [tensor for tensor in tensors if isinstance(tensor, ShardedGradient)]
    return at, stand_ins, plain_at, [tensors[position] for position in plain_at]


def _per_optimizer(stand_ins: Sequence[ShardedGradient]) -> list[tuple[Operations, list[int]]]:
    """Return every optimizer's operations and the positions of its stand-ins: a list may span several optimizers."""
    found: dict[int, tuple[Operations, list[int]]] = {}
    for position, stand_in in enumerate(stand_ins):
        operations = stand_in._operations
        found.setdefault(id(operations), (operations, []))[1].append(position)
    return list(found.values())


def _add_(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    stand_in, other = args[0], args[1]
    if not isinstance(stand_in, ShardedGradient) or not isinstance(other, Tensor) or isinstance(other, ShardedGradient):
        name = next(item._name for item in args if isinstance(item, ShardedGradient))
        raise UsageError(
            f"p.grad of parameter {name!r}: expected p.grad.add_(tensor) with an ordinary tensor of this rank."
        )
    alpha = kwargs.get("alpha", 1)
    stand_in._operations.collect(stand_in, other if alpha == 1 else other * alpha)
    return stand_in


def _vector_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    stand_in = args[0]
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if dim and len(dim) != stand_in.dim():
        raise UsageError(
            f"p.grad of parameter {stand_in._name!r}: expected a norm over all dimensions but got dim={dim}."
        )
    return stand_in._operations.norms([stand_in], float(order), kwargs.get("dtype"))[0]  # type: ignore[no-any-return]


def _foreach_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    tensors = args[0]
    order = float(args[1] if len(args) > 1 else kwargs.get("ord", 2))
    dtype = args[2] if len(args) > 2 else kwargs.get("dtype")
    at, stand_ins, plain_at, plain = _split(tensors)
    result: list[Tensor] = list(tensors)
    for operations, mine in _per_optimizer(stand_ins):
        norms = operations.norms([stand_ins[position] for position in mine], order, dtype)
        for position, norm in zip(mine, norms, strict=True):
            result[at[position]] = norm
    if plain:
        for position, norm in zip(plain_at, torch._foreach_norm(plain, order, dtype=dtype), strict=True):
            result[position] = norm
    return result


def _scale_(divide: bool) -> Callable[[Any, Sequence[Any], dict[str, Any]], Tensor]:
    def handle(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        stand_in, factor = args[0], args[1]
        if not isinstance(stand_in, ShardedGradient) or (isinstance(factor, Tensor) and factor.numel() != 1):
            name = next(item._name for item in args if isinstance(item, ShardedGradient))
            raise UsageError(f"p.grad of parameter {name!r}: expected in-place scaling by a number or a 0-D tensor.")
        stand_in._operations.scale([stand_in], [factor], divide)
        return stand_in

    return handle


def _foreach_scale_(divide: bool) -> Callable[[Any, Sequence[Any], dict[str, Any]], None]:
    def handle(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        tensors, factors = args[0], args[1]
        at, stand_ins, plain_at, plain = _split(tensors)
        one = not isinstance(factors, (list, tuple))
        chosen = [factors] * len(at) if one else [factors[position] for position in at]
        for operations, mine in _per_optimizer(stand_ins):
            operations.scale(
                [stand_ins[position] for position in mine], [chosen[position] for position in mine], divide
            )
        if plain:
            func(plain, factors if one else [factors[position] for position in plain_at])

    return handle


def _in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    stand_in = args[0]
    if any(isinstance(item, Tensor) and item.numel() != 1 for item in args[1:]):
        raise UsageError(f"p.grad of parameter {stand_in._name!r}: {func} expected numbers, not tensors, as arguments.")
    stand_in._operations.apply([stand_in], lambda view: func(view, *args[1:], **kwargs))
    return stand_in  # type: ignore[no-any-return]


def _foreach_in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    _, stand_ins, _, plain = _split(args[0])
    for operations, mine in _per_optimizer(stand_ins):
        chosen = [stand_ins[position] for position in mine]
        operations.apply(chosen, lambda view: func([view], *args[1:], **kwargs))
    if plain:
        func(plain, *args[1:], **kwargs)


def _zero_(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    stand_in = args[0]
    stand_in._operations.zero([stand_in])
    return stand_in  # type: ignore[no-any-return]


def _foreach_zero_(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    _, stand_ins, _, plain = _split(args[0])
    for operations, mine in _per_optimizer(stand_ins):
        operations.zero([stand_ins[position] for position in mine])
    if plain:
        func(plain)


def _check_and_unscale(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    tensors, found_inf, inv_scale = args
    _, stand_ins, _, plain = _split(tensors)
    if plain:
        func(plain, found_inf, inv_scale)
    for operations, mine in _per_optimizer(stand_ins):
        operations.check_finite([stand_ins[position] for position in mine], found_inf, inv_scale)


def _same(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    return args[0]  # type: ignore[no-any-return]


_HANDLERS: dict[Any, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    aten.add_.Tensor: _add_,
    aten.linalg_vector_norm: _vector_norm,
    aten._foreach_norm: _foreach_norm,
    aten.mul_: _scale_(divide=False),
    aten.div_: _scale_(divide=True),
    aten._foreach_mul_: _foreach_scale_(divide=False),
    aten._foreach_div_: _foreach_scale_(divide=True),
    aten.clamp_: _in_place,
    aten.clamp_min_: _in_place,
    aten.clamp_max_: _in_place,
    aten.nan_to_num_: _in_place,
    aten._foreach_clamp_min_: _foreach_in_place,
    aten._foreach_clamp_max_: _foreach_in_place,
    aten.zero_: _zero_,
    aten._foreach_zero_: _foreach_zero_,
    aten._amp_foreach_non_finite_check_and_unscale_: _check_and_unscale,
    aten.detach: _same,
    aten.detach_: _same,
    aten.alias: _same,
}
