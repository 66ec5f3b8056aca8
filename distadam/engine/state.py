"""State dictionaries: this rank's shards, and torch.optim's full format."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from distadam.comm import Collectives
from distadam.engine.flat_bucket import FlatBucket
from distadam.errors import CheckpointError, ConfigError, LayoutMismatch
from distadam.precision import GROUP_KEYS
from distadam.rules import Adam, Rule

FORMAT = 2
KEY = "distadam"


def publish(rule: Rule, flats: Sequence[FlatBucket], groups: Sequence[Mapping[str, Any]], state: Any) -> None:
    """Make ``optimizer.state[p]`` map torch's keys to this rank's 1-D views, empty where another rank owns them."""
    for flat in flats:
        for slot, param in enumerate(flat.params):
            group = groups[flat.bucket.slots[slot].group]
            entry: dict[str, Tensor] = {"step": flat.steps[slot]} if rule.has_step else {}
            names = rule.state_names(group)
            if not names and flat.states and flat.device.type != "meta":
                names = state_names(rule, group, float(flat.steps[slot]))
            for name in names:
                for suffix, part in flat.state(name).stored().items():
                    entry[name + suffix] = flat.slot_part(part, slot)
            if entry:
                state[param].update(entry)


def pack(entries: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return torch's state_dict: parameters become numbers, counted over all groups."""
    numbers = {param: number for number, param in enumerate(param for group in groups for param in group["params"])}
    packed = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [numbers[param] for param in group["params"]]}
        for group in groups
    ]
    state = {numbers[key] if isinstance(key, Tensor) else key: entry for key, entry in entries.items()}
    return {"state": state, "param_groups": packed}


def local_extra(flats: Sequence[FlatBucket], layout_json: str, rank: int) -> dict[str, Any]:
    """Return what a local state_dict needs beyond torch's keys: identity, masters (or remainders) and step counts."""
    return {
        "format": FORMAT,
        "rank": rank,
        "layout": layout_json,
        "masters": [_master(flat) for flat in flats],
        "steps": [flat.steps for flat in flats],
    }


def _master(flat: FlatBucket) -> Tensor | None:
    """Return what the weights keep beside the parameters: fp32 masters, remainders of split ones, or nothing."""
    return next((part.tensor for part in flat.weights.stored().values()), None)


def check_local(extra: Mapping[str, Any], layout_json: str, rank: int, num_ranks: int) -> None:
    """Refuse local state of another rank or layout.

    Raises:
        LayoutMismatch: says what differs and what to use instead.
    """
    if extra.get("format") != FORMAT:
        raise LayoutMismatch(f"expected a local state_dict of format {FORMAT} but got {extra.get('format')!r}.")
    cure = "Local state fits the same rank of the same layout only; use full_state_dict() to move between layouts."
    if extra["rank"] != rank:
        raise LayoutMismatch(f"expected the local state of rank {rank} but got that of rank {extra['rank']}. {cure}")
    if extra["layout"] != layout_json:
        raise LayoutMismatch(
            f"this state was taken from another layout than rank {rank} of {num_ranks} has now. {cure}"
        )


# What torch's __setstate__ fills in where an old state_dict lacks it; everything else it needs.
_FLAGS = {
    "amsgrad": False,
    "capturable": False,
    "centered": False,
    "decoupled_weight_decay": False,
    "differentiable": False,
    "foreach": None,
    "fused": None,
    "maximize": False,
    "nesterov": False,
}


def check_groups(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Refuse a state_dict with other parameter groups; where torch does, in torch's words.

    Raises:
        ValueError: another number of groups or parameters.
        CheckpointError: a hyper-parameter is missing; the state is another optimizer's.
        ConfigError: the state's optimizer was differentiable.
    """
    saved_groups = saved["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    for index, (group, other) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group "
                f"(group {index}: expected {len(group['params'])} parameters but got {len(other['params'])})"
            )
        missing = [key for key in defaults if key not in other and key not in _FLAGS]
        if missing:
            raise CheckpointError(
                f"parameter group {index} of the state_dict: expected {missing[0]!r} but got {sorted(map(str, other))}."
                " Was it saved by another kind of optimizer?"
            )
        if other.get("differentiable"):
            raise ConfigError(f"parameter group {index} of the state_dict: expected differentiable=False but got True.")


def check_entries(
    saved: Mapping[str, Any],
    rule: Rule,
    flats: Sequence[FlatBucket],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
) -> None:
    """Refuse state that lacks what the rule needs, or whose tensors have other shapes.

    Raises:
        CheckpointError: names the parameter and the entry.
    """
    shapes = {param: tuple(param.shape) for param in names}
    if KEY in saved:
        for flat in flats:
            for slot, param in enumerate(flat.params):
                shapes[param] = tuple(flat.slot_shard(flat.param_shard, slot).shape)
    for group, other in zip(groups, saved["param_groups"], strict=True):
        for param, number in zip(group["params"], other["params"], strict=True):
            entry = saved["state"].get(number)
            if not entry:
                continue
            if rule.has_step and not _is_step(entry.get("step")):
                raise CheckpointError(
                    f"parameter {names[param]!r}: expected a number of steps but got {entry.get('step')!r}."
                )
            for name in state_names(rule, _FLAGS | dict(other), step_of(entry, rule)):
                value = entry.get(name)
                got = tuple(value.shape) if isinstance(value, Tensor) else value
                if got != shapes[param] and not (value is None and not rule.has_step):
                    raise CheckpointError(
                        f"parameter {names[param]!r}: expected {name} of shape {shapes[param]} but got {got}. "
                        f"A local state_dict() of distadam carries a {KEY!r} entry; was it dropped?"
                    )


def _is_step(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def state_names(rule: Rule, group: Mapping[str, Any], step: float) -> tuple[str, ...]:
    """Return the states that torch would hold: SGD keeps a momentum buffer when momentum goes to 0."""
    if not rule.has_step and step > 0:
        return rule.state_names({**group, "momentum": 1.0})
    return rule.state_names(group)


def _numbered(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Any]]:
    for group, other in zip(groups, saved["param_groups"], strict=True):
        yield from zip(group["params"], other["params"], strict=True)


def load_groups(
    saved: Mapping[str, Any], groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any], rule: Rule
) -> None:
    """Take hyper-parameters over in place: ``param_groups`` keeps its identity."""
    for group, other in zip(groups, saved["param_groups"], strict=True):
        values = copy.deepcopy({key: value for key, value in other.items() if key != "params"})
        kept = {key: group[key] for key in ("params", "param_names", *GROUP_KEYS) if key in group}
        missing = {key: _FLAGS[key] for key in defaults if key not in values}
        group.clear()
        group.update(kept | values | missing)
        group["params"] = kept["params"]
        for key in GROUP_KEYS:  # how numbers are stored is this optimizer's choice, whoever saved them
            group.pop(key, None)
        group.update({key: kept[key] for key in GROUP_KEYS if key in kept})
        if isinstance(rule, Adam):
            # As in torch: AdamW stays AdamW when it loads Adam's state.
            group["decoupled_weight_decay"] = rule.decouples_weight_decay(group)


def load_local(
    saved: Mapping[str, Any], rule: Rule, flats: Sequence[FlatBucket], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Copy local shards, masters and steps back."""
    numbers = {param: number for param, number in _numbered(saved, groups)}
    for flat, master, steps in zip(flats, saved[KEY]["masters"], saved[KEY]["steps"], strict=True):
        flat.steps.copy_(steps)
        counts = flat.steps.tolist()
        kept = _master(flat)
        if kept is not None:
            kept.copy_(master)
        for slot, param in enumerate(flat.params):
            entry = saved["state"].get(numbers[param], {})
            for name in state_names(rule, groups[flat.bucket.slots[slot].group], counts[slot]):
                for suffix, part in flat.state(name).stored().items():
                    view = flat.slot_part(part, slot)
                    if name + suffix in entry:
                        view.copy_(entry[name + suffix])
                    else:
                        view.zero_()


def load_full(
    saved: Mapping[str, Any], rule: Rule, flats: Sequence[FlatBucket], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Slice a full torch.optim state into shards; what it lacks becomes zero, as before the first step."""
    numbers = {param: number for param, number in _numbered(saved, groups)}
    for flat in flats:
        for slot, param in enumerate(flat.params):
            _load_slot(saved["state"].get(numbers[param], {}), rule, flat, slot, groups)


def _load_slot(
    entry: Mapping[str, Any], rule: Rule, flat: FlatBucket, slot: int, groups: Sequence[Mapping[str, Any]]
) -> None:
    step = step_of(entry, rule)
    flat.steps[slot] = step
    piece = flat.piece_of_slot.get(slot)
    for name in state_names(rule, groups[flat.bucket.slots[slot].group], step):
        moment, value = flat.state(name), entry.get(name)
        if piece is None:
            continue
        if value is None:
            moment.write(piece.start, piece.end, torch.zeros(piece.end - piece.start, device=flat.device))
        else:
            whole = flat.flatten(value.detach(), slot)
            moment.write(piece.start, piece.end, whole[piece.param_start : piece.param_start + piece.end - piece.start])


def load_unplaced(
    saved: Mapping[str, Any], flats: Sequence[FlatBucket], groups: Sequence[Mapping[str, Any]], state: Any
) -> None:
    """Keep what was saved of parameters without a place (frozen ones) whole, as torch does, until they get one."""
    state.clear()
    placed = {param for flat in flats for param in flat.params}
    for param, number in _numbered(saved, groups):
        if param not in placed and saved["state"].get(number):
            state[param] = copy.deepcopy(saved["state"][number])


def load_slots(state: Any, rule: Rule, flat: FlatBucket, groups: Sequence[Mapping[str, Any]]) -> None:
    """Slice the state that `load_unplaced` kept for parameters which have a place now."""
    kept = [slot for slot, param in enumerate(flat.params) if state.get(param)]
    for slot in kept:
        _load_slot(state.pop(flat.params[slot]), rule, flat, slot, groups)
    if kept:
        renew_history([flat])


def step_of(entry: Mapping[str, Any], rule: Rule) -> float:
    """Return the step count that torch's entry of a parameter stands for."""
    if rule.has_step:
        return float(entry.get("step", 0.0))
    # torch's SGD counts no steps; all it knows is whether there is a momentum buffer yet.
    return 1.0 if entry.get("momentum_buffer") is not None else 0.0


def renew_history(flats: Sequence[FlatBucket]) -> None:
    """Group slots by their step counts again, after those were loaded."""
    for flat in flats:
        numbers: dict[float, int] = {}
        flat.history = [numbers.setdefault(step, -1 - len(numbers)) for step in flat.steps.tolist()]
        flat.steps_version = flat.steps._version


def full_state(
    rule: Rule,
    flats: Sequence[FlatBucket],
    groups: Sequence[Mapping[str, Any]],
    unplaced: Mapping[Any, Any],
    collectives: Collectives,
    keep: bool,
) -> dict[Tensor, dict[str, Any]]:
    """Return torch's ``state`` by parameter, CPU tensors; one bucket's worth of one state is whole at a time.

    ``unplaced`` is ``optimizer.state``, for parameters that have no place.

    Collective: every rank of the shard group. Syncs: yes, tensors are copied to the host where ``keep``.
    """
    state: dict[Tensor, dict[str, Any]] = {}
    placed = {param for flat in flats for param in flat.params}
    for flat in flats:
        steps = flat.steps.tolist()
        by_slot = [
            state_names(rule, groups[slot.group], step) for slot, step in zip(flat.bucket.slots, steps, strict=True)
        ]
        for slot, param in enumerate(flat.params):
            if keep and steps[slot] > 0 and (rule.has_step or by_slot[slot]):
                state[param] = {"step": torch.tensor(steps[slot])} if rule.has_step else {}
        for name in dict.fromkeys(name for names in by_slot for name in names):
            shard = flat.state(name).read(0, flat.bucket.shard_numel)
            whole = torch.empty(flat.bucket.numel, dtype=shard.dtype, device=shard.device)
            collectives.all_gather(whole, shard, f"{name} of bucket {flat.bucket.index}").wait()
            if not keep:
                continue
            for slot, param in enumerate(flat.params):
                entry = state.get(param)
                if entry is not None and name in by_slot[slot]:
                    entry[name] = _on_cpu(flat.unflatten(whole, slot))
    order = [param for group in groups for param in group["params"]]
    whole_entries = {param: unplaced[param] for param in order if param not in placed and unplaced.get(param)}
    state |= tree_map_only(Tensor, Tensor.cpu, whole_entries)
    return {param: state[param] for param in order if param in state}


def _on_cpu(view: Tensor) -> Tensor:
    dense = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device="cpu")
    return dense.copy_(view)
