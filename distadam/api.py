"""Adam, AdamW, SGD and RMSprop: torch.optim's signatures, plus four policies.

Note [Validation by torch]: hyper-parameters are checked by constructing torch's own class on a dummy parameter, so that
what is refused, with which words, is the installed torch's decision. Our words follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distadam.errors import ConfigError, UsageError
from distadam.optimizer import ShardedOptimizer
from distadam.policies import CommPolicy, OffloadPolicy, PrecisionPolicy, ShardPolicy


def _defaults_of(torch_class: Callable[..., torch.optim.Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that torch's class makes of ``options``."""
    name = getattr(torch_class, "__name__", "optimizer")
    checked = dict(options)
    if isinstance(options.get("lr"), Tensor) and options["lr"].device.type == "meta":
        checked["lr"] = 1.0
    try:
        defaults = dict(torch_class([torch.zeros(1, requires_grad=True)], **checked).defaults)
    except ValueError as error:
        raise ConfigError(
            f"{str(error).rstrip('.')}. distadam.{name} takes torch.optim.{name}'s arguments and limits."
        ) from error
    except RuntimeError as error:
        raise UsageError(
            f"{str(error).rstrip('.')}. distadam.{name} takes torch.optim.{name}'s arguments and limits."
        ) from error
    if options.get("differentiable"):
        raise ConfigError(
            f"distadam.{name} expected differentiable=False but got True: the update writes shards in place. "
            f"Use torch.optim.{name} to differentiate through a step."
        )
    defaults["lr"] = options["lr"]
    return defaults


class Adam(ShardedOptimizer):
    r"""Adam with sharded state.

    w -= lr m_hat / (sqrt(v_hat) + eps), with m_hat, v_hat the bias-corrected averages of g and g^2; g is the gradient
    averaged over ranks, plus ``weight_decay`` w unless ``decoupled_weight_decay``.

    Args:
        params: iterable of tensors, of (name, tensor), or of group dicts.
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in ``torch.optim.Adam``.
        foreach, fused, capturable: accepted hints; the step is fused and never syncs anyway.
        differentiable: must be False.
        shard, precision, comm, offload: policies; see ``distadam.policies``.

    Example:
        >>> optimizer = distadam.Adam(model.named_parameters(), lr=1e-3)  # doctest: +SKIP

    Source: Kingma & Ba, arXiv 1412.6980; AMSGrad arXiv 1904.09237; sharding arXiv 1910.02054.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        shard: ShardPolicy = ShardPolicy(),
        precision: PrecisionPolicy = PrecisionPolicy(),
        comm: CommPolicy = CommPolicy(),
        offload: OffloadPolicy = OffloadPolicy(),
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            "adam",
            params,
            lambda: _defaults_of(torch.optim.Adam, options),
            shard=shard,
            precision=precision,
            comm=comm,
            offload=offload,
        )


class AdamW(ShardedOptimizer):
    r"""Adam with decoupled weight decay and sharded state.

    w -= lr weight_decay w, then w -= lr m_hat / (sqrt(v_hat) + eps).

    Args:
        params: iterable of tensors, of (name, tensor), or of group dicts.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.AdamW``.
        foreach, fused, capturable: accepted hints; the step is fused and never syncs anyway.
        differentiable: must be False.
        shard, precision, comm, offload: policies; see ``distadam.policies``.

    Example:
        >>> optimizer = distadam.AdamW(model.named_parameters(), lr=3e-4)  # doctest: +SKIP

    Source: Loshchilov & Hutter, arXiv 1711.05101; sharding arXiv 1910.02054.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        shard: ShardPolicy = ShardPolicy(),
        precision: PrecisionPolicy = PrecisionPolicy(),
        comm: CommPolicy = CommPolicy(),
        offload: OffloadPolicy = OffloadPolicy(),
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(
            "adamw",
            params,
            lambda: _defaults_of(torch.optim.AdamW, options),
            shard=shard,
            precision=precision,
            comm=comm,
            offload=offload,
        )


class SGD(ShardedOptimizer):
    r"""Stochastic gradient descent with sharded momentum.

    buf = momentum buf + (1 - dampening) g; w -= lr buf (Nesterov: lr (g + momentum buf)). The first buf is g.

    Args:
        params: iterable of tensors, of (name, tensor), or of group dicts.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        foreach, fused: accepted hints.
        differentiable: must be False.
        shard, precision, comm, offload: policies; see ``distadam.policies``.

    Source: Sutskever et al., ICML 2013; torch.optim.SGD; sharding arXiv 1910.02054.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        shard: ShardPolicy = ShardPolicy(),
        precision: PrecisionPolicy = PrecisionPolicy(),
        comm: CommPolicy = CommPolicy(),
        offload: OffloadPolicy = OffloadPolicy(),
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(
            "sgd",
            params,
            lambda: _defaults_of(torch.optim.SGD, options),
            shard=shard,
            precision=precision,
            comm=comm,
            offload=offload,
        )


class RMSprop(ShardedOptimizer):
    r"""RMSprop with sharded state.

    w -= lr g / (sqrt(EWA(g^2)) + eps); centred: the variance instead of the second moment; optional momentum.

    Args:
        params: iterable of tensors, of (name, tensor), or of group dicts.
        lr, alpha, eps, weight_decay, momentum, centered, maximize: as in ``torch.optim.RMSprop``.
        foreach, capturable: accepted hints.
        differentiable: must be False.
        shard, precision, comm, offload: policies; see ``distadam.policies``.

    Source: Hinton, lecture 6e; Graves, arXiv 1308.0850 (centred); torch.optim.RMSprop; sharding arXiv 1910.02054.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        shard: ShardPolicy = ShardPolicy(),
        precision: PrecisionPolicy = PrecisionPolicy(),
        comm: CommPolicy = CommPolicy(),
        offload: OffloadPolicy = OffloadPolicy(),
    ) -> None:
        options = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(
            "rmsprop",
            params,
            lambda: _defaults_of(torch.optim.RMSprop, options),
            shard=shard,
            precision=precision,
            comm=comm,
            offload=offload,
        )
