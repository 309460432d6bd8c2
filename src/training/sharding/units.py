"""Sharding of a model with FSDP2 (torch.distributed.fsdp.fully_shard).

Each block of the towers is a unit, and what is left is the last unit. The parameters of a unit are gathered before it
runs and freed afterwards. Blocks are found by structure, as for compilation, so every tower is sharded: native ones,
ResNets, and those of timm and Hugging Face.

fully_shard does not accept parameters without dimensions (logit_scale). They stay ordinary parameters, equal on all
ranks, so their names and shapes in checkpoints do not change. `shards.Shards` averages their gradients.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from open_clip import device as devices
from training import compilation
from training.params import DistributedConfig
from training.ranks import World

logger = logging.getLogger(__name__)

_FORWARD_METHODS = ("encode_image", "encode_text")  # called in addition to `forward`


def shard_model(
    model: nn.Module,
    cfg: DistributedConfig,
    world: World,
    gather_dtype: torch.dtype | None = None,
    materialize: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Shard a model in place, unit by unit. A rank never holds more than one whole unit on its device.

    Args:
        model: on the CPU or on the device of this rank; tensors may also be on the meta device.
        gather_dtype: dtype to which parameters are cast when they are gathered. None: they keep theirs.
        materialize: computes the values of a tensor that is on the meta device.

    Raises:
        ValueError: --hsdp does not divide the number of processes.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    pin = devices.get(world.device).pin_memory
    options: dict[str, Any] = {
        "mesh": create_mesh(cfg, world),
        # Autocast casts inputs and outputs, as in other runs.
        "mp_policy": MixedPrecisionPolicy(gather_dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=pin) if cfg.fsdp_offload_cpu else OffloadPolicy(),
    }
    blocks = compilation.find_blocks(model)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for unit in (*blocks, model):
        if materialize is not None:
            _materialize(unit, materialize, world.device, done)
        # The backward pass starts with the last unit, so gathering it again would gain nothing.
        reshard = unit is not model and not cfg.fsdp_no_reshard_after_forward
        with _without_scalars(unit, world.device):
            fully_shard(unit, reshard_after_forward=reshard, **options)
    _gather_for_methods(model)
    if world.is_master:
        logger.info(
            "--fsdp: %s in %d units (%d blocks and the rest).", _describe(cfg, world), len(blocks) + 1, len(blocks)
        )


def _gather_for_methods(model: nn.Module) -> None:
    """Let the model gather its weights for `encode_image` and `encode_text`, unless `forward` calls them.

    Within `forward` they are gathered already, and FSDP would free the last unit's weights before the backward pass.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
    for name in filter(functools.partial(hasattr, model), _FORWARD_METHODS):
        plain = getattr(model, name)
        register_fsdp_forward_method(model, name)
        gathering = getattr(model, name)

        @functools.wraps(plain)
        def call(*args: Any, plain: Any = plain, gathering: Any = gathering, **kwargs: Any) -> Any:
            return (plain if depth else gathering)(*args, **kwargs)

        setattr(model, name, call)


def _describe(cfg: DistributedConfig, world: World) -> str:
    if cfg.hsdp:
        return f"{cfg.hsdp} replicas of {world.world_size // cfg.hsdp} shards"
    return f"{world.world_size} shards"


def create_mesh(cfg: DistributedConfig, world: World) -> Any:
    """Create the device mesh: ("shard",), or with --hsdp ("replicate", "shard").

    Raises:
        ValueError: --hsdp does not divide the number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if not cfg.hsdp:
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    shards, rest = divmod(world.world_size, cfg.hsdp)
    if rest or shards < 2:
        raise ValueError(
            f"--hsdp {cfg.hsdp} needs a number of processes that is a multiple of it and at least {2 * cfg.hsdp}, and "
            f"this run has {world.world_size}. Use another --hsdp, or leave it out."
        )
    return init_device_mesh(world.device.type, (cfg.hsdp, shards), mesh_dim_names=("replicate", "shard"))


def _materialize(
    unit: nn.Module, compute: Callable[[Tensor], Tensor], device: torch.device, done: dict[int, tuple[Tensor, Tensor]]
) -> None:
    """Replace the tensors of a unit that are on the meta device. A tensor with several names stays one tensor."""

    def real(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            value = compute(tensor).to(device)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
            done[id(tensor)] = tensor, value  # with the tensor, so that its id is not used again
        return done[id(tensor)][1]

    for module in unit.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor.is_meta:
                    tensors[name] = real(tensor)  # type: ignore[assignment]


@contextlib.contextmanager
def _without_scalars(unit: nn.Module, device: torch.device) -> Iterator[None]:
    """Hide parameters without dimensions from fully_shard, and move them to the device."""
    modules = [m for m in unit.modules() if any(p is not None and p.dim() == 0 for p in m._parameters.values())]
    own = [dict(module._parameters) for module in modules]
    for module, parameters in zip(modules, own, strict=True):
        for name, parameter in parameters.items():
            if parameter is not None and parameter.dim() == 0:
                parameter.data = parameter.data.to(device)
                del module._parameters[name]
    try:
        yield
    finally:
        for module, parameters in zip(modules, own, strict=True):
            sharded = dict(module._parameters)
            module._parameters.clear()  # and fill it again in the same order, which is that of state dicts
            module._parameters.update({name: sharded.get(name, p) for name, p in parameters.items()})
