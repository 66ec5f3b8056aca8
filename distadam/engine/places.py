"""From parameters to their places: names, checks, fingerprints, and the flat buckets they end up in."""

from __future__ import annotations

import gc
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distadam.comm import DistributedDataParallel
from distadam.engine.flat_bucket import TORCH_DTYPES, dense_strides
from distadam.errors import ConfigError
from distadam.layout import ParamSpec
from distadam.policies import PrecisionPolicy
from distadam.precision import StorageChoice, check_rule, choose


def param_names(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Return every parameter's name: the user's, else ``param.N`` counted over all groups."""
    names: dict[Tensor, str] = {}
    for group in groups:
        given = group.get("param_names")
        for position, param in enumerate(group["params"]):
            names[param] = given[position] if given is not None else f"param.{len(names)}"
    return names


def check_groups(groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> None:
    """Refuse groups that hold a parameter twice (torch warns of it) or ask for a differentiable step.

    Raises:
        ConfigError: names the parameter or the group.
    """
    for index, group in enumerate(groups):
        if group.get("differentiable"):
            raise ConfigError(
                f"group {index}: expected differentiable=False but got True: the update writes shards in place."
            )
        if len(set(group["params"])) < len(group["params"]):
            name = next(names[param] for param, times in Counter(group["params"]).items() if times > 1)
            raise ConfigError(f"parameter {name!r} is in parameter group {index} twice; expected it once.")


def check_params(names: Mapping[Tensor, str]) -> None:
    """Refuse parameters that no shard can hold. Frozen ones need none, so integers and 8-bit floats may be among them.

    Raises:
        ConfigError: for complex, sparse, quantised or DTensor parameters, and for two that share memory.
    """
    for param, name in names.items():
        what = None
        if param.layout != torch.strided:
            what = f"layout {param.layout}"
        elif param.is_complex():
            what = f"complex dtype {param.dtype}"
        elif param.is_quantized or (param.requires_grad and param.dtype not in TORCH_DTYPES.values()):
            what = f"dtype {param.dtype}"
        elif (
            type(param).__name__ == "DTensor"
            or "torch.distributed.tensor" in type(getattr(param, "data", None)).__module__
        ):
            what = "a DTensor"
        if what is not None:
            raise ConfigError(
                f"parameter {name!r}: expected a dense real torch tensor (float64, float32, float16, bfloat16) but got "
                f"{what}. Leave it to torch.optim."
            )
        if not param.is_leaf:
            raise ConfigError(f"parameter {name!r}: expected a leaf tensor but got the result of an operation.")
    _refuse_shared_memory(names)


def check_reduce(names: Mapping[Tensor, str], reduce: str, unshared: str) -> None:
    """Refuse a ``CommPolicy(reduce=...)`` that parameters or ranks do not allow.

    Args:
        names: of parameters.
        reduce: the policy's.
        unshared: why ranks of one host do not read each other's memory; empty where they do.

    Raises:
        ConfigError: names a parameter, or says that ranks share no memory.
    """
    if reduce == "exchange":
        _check_device(names, 'CommPolicy(reduce="exchange")', 'use reduce="auto"')
    if reduce == "shared":
        _check_device(names, 'CommPolicy(reduce="shared")', 'use reduce="auto"', ("cpu", "cuda"), "CPU or CUDA")
    on_cpu = any(param.device.type == "cpu" and param.requires_grad for param in names)
    if reduce == "shared" and unshared and on_cpu:
        raise ConfigError(
            'CommPolicy(reduce="shared") expected the ranks of the shard group to be processes of one host and network '
            "namespace, or of several with equally many each, which reach each other's Unix sockets, but found that "
            f'{unshared}; use reduce="auto" or "exchange".'
        )


def check_sharing(names: Mapping[Tensor, str], share_parameters: bool, one_host: bool) -> None:
    """Refuse ``ShardPolicy(share_parameters=True)`` where parameters or ranks do not allow it.

    Raises:
        ConfigError: names a parameter, or says that ranks share no memory.
    """
    if share_parameters:
        _check_device(names, "ShardPolicy(share_parameters=True)", "leave it out")
        if not one_host:
            raise ConfigError(
                "ShardPolicy(share_parameters=True) expected the ranks of the shard group to be processes of one host "
                "and network namespace, which reach each other's Unix sockets (and CommPolicy(reduce=...) 'auto' or "
                "'shared'); leave it out."
            )


def _check_device(
    names: Mapping[Tensor, str], what: str, cure: str, types: tuple[str, ...] = ("cpu",), said: str = "CPU"
) -> None:
    for param, name in names.items():
        if param.device.type not in types and param.requires_grad:
            raise ConfigError(
                f"parameter {name!r}: {what} expected {said} parameters but got one on {param.device}; {cure}."
            )


def _refuse_shared_memory(names: Mapping[Tensor, str]) -> None:
    storages: dict[tuple[torch.device, int], list[tuple[int, int, Tensor]]] = {}
    for param in names:
        if param.numel() and param.device.type != "meta":
            last = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
            span = (param.data_ptr(), param.data_ptr() + (last + 1) * param.element_size(), param)
            storages.setdefault((param.device, param.untyped_storage().data_ptr()), []).append(span)
    for spans in storages.values():
        spans.sort(key=operator.itemgetter(0))
        for position, first in enumerate(spans):
            following = position + 1
            while following < len(spans) and spans[following][0] < first[1]:
                second = spans[following]
                if _share_elements(first, second):
                    raise ConfigError(
                        f"parameters {names[first[2]]!r} and {names[second[2]]!r} are two tensors over the same memory;"
                        " expected one Parameter object. Tie weights by assigning the same Parameter to both modules."
                    )
                following += 1


def _share_elements(first: tuple[int, int, Tensor], second: tuple[int, int, Tensor]) -> bool:
    """Say whether two tensors whose address ranges overlap share an element; columns of one matrix do not."""
    itemsize, start = first[2].element_size(), first[0]
    if second[2].element_size() != itemsize or (second[0] - start) % itemsize:
        return True
    taken = torch.zeros((max(first[1], second[1]) - start) // itemsize, dtype=torch.bool)
    for begin, _, param in (first, second):
        sizes = [1 if stride == 0 else size for size, stride in zip(param.shape, param.stride(), strict=True)]
        place = taken.as_strided(sizes, param.stride(), (begin - start) // itemsize)
        if place.any():
            return True
        place.fill_(True)
    return False


def storage_choices(
    groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str], precision: PrecisionPolicy, rule: str
) -> dict[Tensor, StorageChoice]:
    """Return how each parameter's weights and states are stored; frozen ones of other dtypes have none.

    Raises:
        ConfigError: a parameter's dtype, or the rule, cannot have what is asked for.
    """
    choices = {}
    for group in groups:
        for param in group["params"]:
            if param.dtype in TORCH_DTYPES.values():
                choices[param] = choose(precision, group, param.dtype, names[param])
                check_rule(rule, group, choices[param].moments, names[param])
    return choices


def param_specs(
    params: Iterable[Tensor],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    choices: Mapping[Tensor, StorageChoice],
) -> list[ParamSpec]:
    """Return what the layout needs to know, in the order of ``params``."""
    group_of = {param: index for index, group in enumerate(groups) for param in group["params"]}
    return [
        ParamSpec(
            name=names[param],
            shape=tuple(param.shape),
            dtype=str(param.dtype).removeprefix("torch."),
            device=str(param.device),
            itemsize=param.element_size(),
            group=group_of[param],
            strides=dense_strides(param),
            storage=choices[param].key,
            align=choices[param].align,
        )
        for param in params
    ]


def by_trainable(groups: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters that require a gradient, and the others."""
    params = [param for group in groups for param in group["params"]]
    return [param for param in params if param.requires_grad], [param for param in params if not param.requires_grad]


def fingerprint_lines(groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> list[tuple[str, object]]:
    """Return what ranks must share about parameters and hyper-parameters, as (what, value)."""
    lines: list[tuple[str, object]] = [("number of parameter groups", len(groups))]
    for index, group in enumerate(groups):
        for key in sorted(key for key in group if key not in ("params", "param_names")):
            lines.append((f"group {index}: {key}", _plain(group[key])))
        lines.append((f"group {index}: number of parameters", len(group["params"])))
        for param in group["params"]:
            value = (tuple(param.shape), str(param.dtype), param.device.type, dense_strides(param), param.requires_grad)
            lines.append((f"parameter {names[param]!r} (shape, dtype, device, strides, requires_grad)", value))
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type != "meta" else "meta tensor"
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    return type(value).__qualname__  # whose repr may hold an address


def refuse_ddp(names: Mapping[Tensor, str]) -> None:
    """Look once for a DDP wrapper that reduces the same gradients.

    Raises:
        ConfigError: naming a parameter that a live ``DistributedDataParallel`` module owns.
    """
    objects = gc.get_objects()
    if not any(issubclass(kind, DistributedDataParallel) for kind in set(map(type, objects))):
        return
    for item in objects:
        if issubclass(type(item), DistributedDataParallel):
            for param in item.parameters():
                if param in names:
                    raise ConfigError(
                        f"parameter {names[param]!r} belongs to a DistributedDataParallel module: its gradients would "
                        "be reduced twice. Train the bare module; distadam reduces gradients itself."
                    )
