"""The parts of a sharded model that a rank holds, as ordinary tensors, for the optimizer and the average.

DTensors cost Python code in every operation, and foreach and fused kernels do not accept them together with ordinary
tensors. Therefore the optimizer updates the local parts: parameters that share the memory of the DTensors. This is the
same computation for every optimizer that treats the elements of a parameter independently.

State dicts have DTensors again, so their names and shapes are those of other runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from open_clip import device as devices
from training.optim import create_optimizer
from training.params import OptimConfig
from training.sharding.tensors import is_sharded, join_like, local_part, split_like

# Optimizers of timm that treat the elements of a parameter independently.
ELEMENTWISE = frozenset({
    "adam", "adamw", "nadam", "nadamw", "radam", "adamax", "sgd", "nesterov", "momentum", "sgdw", "nesterovw",
    "lion", "rmsprop", "rmsproptf", "adabelief", "laprop", "adopt", "adoptw", "madgrad", "madgradw",
})  # fmt: skip

_FORMS = ("auto", "torch", "off")  # of AdamW, which leave parameters where they are


def check_optimizer(cfg: OptimConfig) -> None:
    """Raise ValueError if the optimizer needs whole parameters, or moves them."""
    if cfg.opt.lower().removeprefix("timm/") not in ELEMENTWISE:
        raise ValueError(
            f"--opt {cfg.opt} cannot be used with --fsdp, because its update of an element depends on other elements "
            "of the parameter, which other processes hold. Use --opt adamw."
        )
    if cfg.fused_optimizer not in _FORMS:
        raise ValueError(
            f"--fused-optimizer {cfg.fused_optimizer} cannot be used with --fsdp, because it moves the parameters. Use "
            "--fused-optimizer auto."
        )


class Shards:
    """The local parts of a sharded model's parameters.

    Attributes:
        wholes: the parameters of the model by name, DTensors or ordinary tensors.
        parameters: the local parts of `wholes`. Parameters that are not sharded are themselves.
        device: of the collectives.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Create it. `device`: of the collectives; with CPU offload the parameters are elsewhere."""
        self._model: Any = model
        self.device = device
        self.wholes = dict(model.named_parameters())
        self.parameters = {name: _as_local_parameter(p) for name, p in self.wholes.items()}
        self._replicated = [p for p in self.wholes.values() if not is_sharded(p)]
        sharded: Any = next(p for p in self.wholes.values() if is_sharded(p))
        self._group = sharded.device_mesh.get_group("shard")
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers()
        ]

    def create_optimizer(self, cfg: OptimConfig) -> torch.optim.Optimizer:
        """Create the optimizer of the local parts. Its groups and the names in its state dict are those of other runs.

        Raises:
            ValueError: see `check_optimizer` and `create_optimizer` of training.optim.
        """
        check_optimizer(cfg)
        if cfg.fused_optimizer == "auto":  # without FlatAdamW, which moves the parameters
            kinds = {devices.get(p.device) for p in self.parameters.values()}  # with CPU offload there are two
            form = "torch" if all(kind.fused_adamw_skips for kind in kinds) else "off"
            cfg = dataclasses.replace(cfg, fused_optimizer=form)
        optimizer = create_optimizer(self._model, cfg, self.device)
        local = {id(whole): self.parameters[name] for name, whole in self.wholes.items()}
        wholes = {id(self.parameters[name]): whole for name, whole in self.wholes.items()}
        for group in optimizer.param_groups:
            group["params"] = [local[id(p)] for p in group["params"]]
        ordered = [wholes[id(p)] for group in optimizer.param_groups for p in group["params"]]
        _convert_state_dicts(optimizer, ordered)
        optimizer.shards = self  # type: ignore[attr-defined]  # read by training.gradients
        return optimizer

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the gradients of a finished backward pass to the local parts, and make the ranks agree.

        Gradients of parameters that are not sharded are averaged, and statistics of BatchNorm are those of rank 0, as
        DDP does both.
        """
        self.bind()
        for name, whole in self.wholes.items():
            if is_sharded(whole):
                self.parameters[name].grad = None if whole.grad is None else local_part(whole.grad)
                whole.grad = None
        _update_as_one([p.grad for p in self._replicated], _average_over_ranks)
        _update_as_one(self._statistics, lambda buffer: dist.broadcast(buffer, 0))

    def bind(self) -> None:
        """Let the local parts share the memory of the DTensors. FSDP may move them, at the latest in the first step."""
        for name, whole in self.wholes.items():
            if is_sharded(whole):
                self.parameters[name].data = local_part(whole)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Compute the global 2-norm of the gradients: a scalar on the device, equal on all ranks."""
        parts = [p.grad for name, p in self.parameters.items() if p.grad is not None and is_sharded(self.wholes[name])]
        squares = _sum_of_squares(parts, self.device)
        dist.all_reduce(squares, group=self._group)
        return (squares + _sum_of_squares([p.grad for p in self._replicated], self.device)).sqrt()

    @torch.no_grad()
    def scale_gradients(self, factor: Tensor) -> None:
        for device, gradients in _by_device(p.grad for p in self.parameters.values()).items():
            torch._foreach_mul_(gradients, factor.to(device))

    def reshard(self) -> None:
        """Free gathered parameters. Call it after local parts have changed outside of a step."""
        for module in self._model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def _as_local_parameter(whole: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(local_part(whole), whole.requires_grad) if is_sharded(whole) else whole


def _by_device(tensors: Iterable[Tensor | None]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            found.setdefault(tensor.device, []).append(tensor)
    return found


def _average_over_ranks(gradient: Tensor) -> None:
    dist.all_reduce(gradient)
    gradient.div_(dist.get_world_size())


def _update_as_one(tensors: Iterable[Tensor | None], update: Callable[[Tensor], object]) -> None:
    """Update the tensors in place through one flat tensor per dtype, so that `update` communicates once per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.flatten() for tensor in same])
        update(flat)
        parts = flat.split([tensor.numel() for tensor in same])
        views = [part.view_as(tensor) for tensor, part in zip(same, parts, strict=True)]
        torch._foreach_copy_(same, views, non_blocking=True)  # see FlatTensors


def _sum_of_squares(tensors: Iterable[Tensor | None], device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for found in _by_device(tensors).values():
        norms = torch._foreach_norm(found, 2, dtype=torch.float32)
        total += torch.stack(norms).square().sum().to(device)
    return total


def _convert_state_dicts(optimizer: torch.optim.Optimizer, wholes: Sequence[Tensor]) -> None:
    """Let the optimizer's state dicts have DTensors like `wholes`, in the order of its parameters."""

    def join(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: _map(values, wholes[i], _join_if_part) for i, values in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def split(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        like = dict(zip(order, wholes, strict=False))
        state = {
            i: _map(values, like[i], _split_if_whole) if i in like else values
            for i, values in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(join)
    optimizer.register_load_state_dict_pre_hook(split)


def _map(values: Mapping[str, Any], like: Tensor, convert: Any) -> dict[str, Any]:
    return {name: convert(value, like) if isinstance(value, Tensor) else value for name, value in values.items()}


def _join_if_part(value: Tensor, like: Tensor) -> Tensor:
    return join_like(value, like) if value.shape == local_part(like).shape else value


def _split_if_whole(value: Tensor, like: Tensor) -> Tensor:
    return split_like(value, like) if value.shape == like.shape else value
