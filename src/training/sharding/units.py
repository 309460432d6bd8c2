"""Sharding of a model with FSDP2 (torch.distributed.fsdp.fully_shard).

Each block of the towers is a unit, and what is left is the last unit. The parameters of a unit are gathered before it
runs and freed afterwards. Blocks are found by structure, as for compilation, so every tower is sharded: native ones,
ResNets, and those of timm and Hugging Face.

Some parameters stay ordinary ones, equal on all ranks, and `shards.Shards` averages their gradients:
- those without dimensions (logit_scale), which fully_shard does not accept;
- with autocast, those of layers that have only vectors (normalization, layer scale). They are small and stay float32 as
  in other runs: the parameters of a unit are gathered in half precision, which BatchNorm with running statistics in
  float32 does not accept, nor LayerNorm with inputs in float32 on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
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


def check_device(device: torch.device) -> None:
    """Raise RuntimeError if the installed torch cannot shard on the device."""
    problem = devices.get(device).why_not_shard()
    if problem is not None:
        raise RuntimeError(problem)


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
        RuntimeError: the installed torch cannot shard on the device.
        ValueError: --hsdp does not divide the number of processes.
    """
    check_device(world.device)
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    pin = devices.get(world.device).pin_memory
    options: dict[str, Any] = {
        "mesh": create_mesh(cfg, world),
        # Autocast casts inputs and outputs, as in other runs.
        "mp_policy": MixedPrecisionPolicy(gather_dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=pin) if cfg.fsdp_offload_cpu else OffloadPolicy(),
    }
    blocks = _without_tied(compilation.find_blocks(model), model)
    buffers: dict[int, tuple[Tensor, Tensor]] = {}
    for unit in (*blocks, model):
        if materialize is not None:
            _materialize(unit, materialize, world.device, buffers)
        # The backward pass starts with the last unit, so gathering it again would gain nothing.
        reshard = unit is not model and not cfg.fsdp_no_reshard_after_forward
        with _without_replicated(unit, world.device, keeps_vectors=gather_dtype is not None):
            fully_shard(unit, reshard_after_forward=reshard, **options)
    _gather_for_methods(model)
    if world.is_master:
        logger.info(
            "--fsdp: %s in %d units (%d blocks and the rest).", _describe(cfg, world), len(blocks) + 1, len(blocks)
        )


def _without_tied(blocks: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """Return the blocks without those that share a parameter with another module. They belong to the last unit."""
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inside]
    owners: Counter[int] = Counter()
    for modules in (outside, *(block.modules() for block in blocks)):
        owners.update({id(p) for module in modules for p in module._parameters.values() if p is not None})
    return [block for block in blocks if all(owners[id(p)] == 1 for p in block.parameters())]


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
    unit: nn.Module,
    compute: Callable[[Tensor], Tensor],
    device: torch.device,
    buffers: dict[int, tuple[Tensor, Tensor]],
) -> None:
    """Replace the tensors of a unit that are on the meta device. A tensor with several names stays one tensor.

    Args:
        buffers: (meta tensor, tensor) of the units so far, by id. Parameters are not added, because every rank would
            keep the whole model on its device. They are not shared between units.
    """
    parameters: dict[int, tuple[Tensor, Tensor]] = {}

    def real(tensor: Tensor) -> Tensor:
        is_parameter = isinstance(tensor, nn.Parameter)
        done = parameters if is_parameter else buffers
        if id(tensor) not in done:
            value = compute(tensor).to(device)
            value = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
            done[id(tensor)] = tensor, value  # with the tensor, so that its id is not used again
        return done[id(tensor)][1]

    for module in unit.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor.is_meta:
                    tensors[name] = real(tensor)  # type: ignore[assignment]


@contextlib.contextmanager
def _without_replicated(unit: nn.Module, device: torch.device, keeps_vectors: bool) -> Iterator[None]:
    """Hide from fully_shard the parameters that stay ordinary ones, and move them to the device."""
    hidden: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    for module in unit.modules():
        own = dict(module._parameters)
        found = {name: p for name, p in own.items() if p is not None}
        if not (keeps_vectors and all(p.dim() < 2 for p in found.values())):
            found = {name: p for name, p in found.items() if p.dim() == 0}
        for name, parameter in found.items():
            parameter.data = parameter.data.to(device)
            del module._parameters[name]
        if found:
            hidden.append((module, own))
    try:
        yield
    finally:
        for module, parameters in hidden:
            sharded = dict(module._parameters)
            module._parameters.clear()  # and fill it again in the same order, which is that of state dicts
            module._parameters.update({name: sharded.get(name, p) for name, p in parameters.items()})
