"""Who is compared: each contender turns a model into a training step. Peers are imported only where they run.

A peer runs with its defaults except for what its row or docstring says; no peer was tuned further.
ZeroRedundancyOptimizer and OSS stand behind DDP with gradients as bucket views.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from workloads import LR, Workload

import distadam


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A contender on one rank.

    Attributes:
        forward: what the batch goes through.
        backward: takes the loss.
        update: everything behind backward, gradients cleared.
        parameters: returns whole parameters in the model's order; collective.
        optimizer: has `comm_stats` if it is distadam's.
    """

    forward: nn.Module
    backward: Callable[[Tensor], object]
    update: Callable[[], object]
    parameters: Callable[[], list[Tensor]]
    optimizer: object = None


def _trainer(model: nn.Module, optimizer: torch.optim.Optimizer, forward: nn.Module | None = None) -> Trainer:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(
        forward=forward or model,
        backward=Tensor.backward,
        update=update,
        parameters=lambda: [param.detach() for param in model.parameters()],
        optimizer=optimizer,
    )


def _adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, fused=True)


def compute(work: Workload) -> Trainer:
    """No communication at all: every rank trains alone."""
    return _trainer(work.model, _adamw(work.model.parameters()))


def ddp(work: Workload, view: bool = False) -> Trainer:
    """DistributedDataParallel, whole optimizer state on every rank."""
    wrapped = DistributedDataParallel(work.model, gradient_as_bucket_view=view)
    return _trainer(work.model, _adamw(work.model.parameters()), wrapped)


def ddp_view(work: Workload) -> Trainer:
    """The same with gradients that live in the buckets."""
    return ddp(work, view=True)


def zero_redundancy(work: Workload) -> Trainer:
    """torch's ZeRO-1 behind DDP, both with their bucket views."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = DistributedDataParallel(work.model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        work.model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=LR, fused=True
    )
    return _trainer(work.model, optimizer, wrapped)


def fsdp(work: Workload, reshard: bool = False) -> Trainer:
    """FSDP2 by layer (MLP) or block (GPT), then the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in work.wrapped:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(work.model, mesh=mesh, reshard_after_forward=reshard)
    trainer = _trainer(work.model, _adamw(work.model.parameters()))
    trainer.parameters = lambda: [param.detach().full_tensor() for param in work.model.parameters()]
    return trainer


def fsdp_reshard(work: Workload) -> Trainer:
    """The same with parameters freed between forward and backward."""
    return fsdp(work, reshard=True)


def deepspeed_zero(work: Workload, stage: int) -> Trainer:
    """DeepSpeed's ZeRO with its own CPU optimizer."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    deepspeed.utils.logging.logger.setLevel("ERROR")
    optimizer = DeepSpeedCPUAdam(work.model.parameters(), lr=LR, weight_decay=0.01, adamw_mode=True)
    config = {
        "train_micro_batch_size_per_gpu": len(work.batches[0][0]),
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=work.model, optimizer=optimizer, config=config, dist_init_required=False)
    return Trainer(
        forward=engine,
        backward=engine.backward,
        update=engine.step,
        parameters=lambda: [param.detach() for param in work.model.parameters()],
    )


def deepspeed_zero1(work: Workload) -> Trainer:
    """Stage 1."""
    return deepspeed_zero(work, 1)


def deepspeed_zero2(work: Workload) -> Trainer:
    """Stage 2."""
    return deepspeed_zero(work, 2)


def fairscale_oss(work: Workload) -> Trainer:
    """fairscale's ZeRO-1 behind DDP."""
    from fairscale.optim.oss import OSS

    wrapped = DistributedDataParallel(work.model, gradient_as_bucket_view=True)
    return _trainer(work.model, OSS(work.model.parameters(), torch.optim.AdamW, lr=LR, fused=True), wrapped)


def _distadam(work: Workload, prefetch: bool = False, share: bool = False, **comm: object) -> Trainer:
    shard = distadam.ShardPolicy(**({"share_parameters": True} if share else {}))
    optimizer = distadam.AdamW(work.model.named_parameters(), lr=LR, shard=shard, comm=distadam.CommPolicy(**comm))
    if prefetch:
        optimizer.prefetch(work.model)
    trainer = _trainer(work.model, optimizer)
    read = trainer.parameters

    def parameters() -> list[Tensor]:
        optimizer.flush()
        return read()

    trainer.parameters = parameters
    return trainer


def shared(work: Workload) -> Trainer:
    """The defaults; on one host that is reduce="shared"."""
    return _distadam(work)


def shared_prefetch(work: Workload) -> Trainer:
    """Defaults and ``prefetch(model)``."""
    return _distadam(work, prefetch=True)


def shared_parameters(work: Workload) -> Trainer:
    """One copy of the parameters for all ranks of the host."""
    return _distadam(work, share=True)


def exchange(work: Workload) -> Trainer:
    """As between hosts: pairwise messages over the group's backend."""
    return _distadam(work, reduce="exchange")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A row of the table.

    Attributes:
        label: as the table shows it.
        build: makes the trainer.
        backend: of torch.distributed; "" for none.
        plain: whether it is also run without the allocator settings.
        everywhere: whether it is also run on more ranks than the first number.
    """

    label: str
    build: Callable[[Workload], Trainer]
    backend: str = "gloo"
    plain: bool = False
    everywhere: bool = True


CONTENDERS = {
    "compute": Contender(label="compute alone", build=compute, backend=""),
    "ddp": Contender(label="DDP + AdamW(fused)", build=ddp, plain=True),
    "ddp-again": Contender(label="DDP + AdamW(fused), again", build=ddp, plain=True),
    "ddp-view": Contender(label="DDP, gradients as bucket views", build=ddp_view, plain=True),
    "zero-redundancy": Contender(label="DDP + ZeroRedundancyOptimizer", build=zero_redundancy, plain=True),
    "fsdp": Contender(label="FSDP2, no reshard", build=fsdp),
    "fsdp-reshard": Contender(label="FSDP2, reshard", build=fsdp_reshard, everywhere=False),
    "deepspeed1": Contender(label="DeepSpeed ZeRO-1, CPUAdam", build=deepspeed_zero1, everywhere=False),
    "deepspeed2": Contender(label="DeepSpeed ZeRO-2, CPUAdam", build=deepspeed_zero2),
    "oss": Contender(label="DDP + fairscale OSS", build=fairscale_oss),
    "distadam": Contender(label="distadam (shared)", build=shared, plain=True),
    "distadam-prefetch": Contender(label="distadam (shared, prefetch)", build=shared_prefetch, everywhere=False),
    "distadam-share-parameters": Contender(label="distadam (shared parameters)", build=shared_parameters),
    "distadam-exchange": Contender(label="distadam (exchange, gloo)", build=exchange),
    "distadam-mpi4py": Contender(label="distadam (exchange, mpi4py)", build=exchange, backend="mpi4py"),
}
