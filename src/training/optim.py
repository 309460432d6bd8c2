"""The optimizer of a run: AdamW with open_clip's two parameter groups, or one of timm's."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from open_clip import device as devices
from open_clip.config import closest
from training.flat_adamw import FlatAdamW
from training.params import OptimConfig

logger = logging.getLogger(__name__)

# Options for the implementation. They depend on the device, so they are not taken from a checkpoint.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
_BFLOAT16_FORMS = ("auto", "torch", "off")


def create_optimizer(
    model: nn.Module, cfg: OptimConfig, device: torch.device | str, is_captured: bool = False
) -> torch.optim.Optimizer:
    """Create the optimizer for the trainable parameters.

    Its state dict is compatible with open_clip's: same groups, same order of parameters. It is also compatible between
    fused and unfused implementations: `load_state_dict` keeps the implementation of this optimizer.

    Args:
        model: the bare module, already on its device. It must not be wrapped by DDP, whose prefix hides the names that
            timm excludes from weight decay.
        cfg: options that are None get the default of AdamW or timm.
        device: device of the model. Together with the dtype of the weights it decides what `fused_optimizer="auto"` is.
        is_captured: the step will be part of a compiled graph, so "auto" is FlatAdamW, which torch.compile can trace.

    Raises:
        ValueError: the optimizer is unknown, does not support the device or the dtype of the weights, or the model has
            no trainable parameters.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("The model has no trainable parameters. Unlock a part of it (see --lock-image, --lock-text).")
    check_name(cfg.opt)
    for dtype in {p.dtype for p in model.parameters() if p.requires_grad}:
        check_weights(cfg, dtype)
    opt = cfg.opt.lower()
    if opt == "adamw":
        optimizer = _adamw(model, cfg, torch.device(device), is_captured)
    else:
        optimizer = _timm(model, cfg, opt.removeprefix("timm/"))
    optimizer.register_load_state_dict_pre_hook(_keep_implementation)
    return optimizer


def check_name(opt: str) -> None:
    """Raise ValueError unless `opt` is "adamw" or "timm/NAME" with the name of an optimizer of timm."""
    name = opt.lower()
    if name == "adamw":
        return
    if not name.startswith("timm/"):
        raise ValueError(f"Unknown --opt {opt!r}. Use adamw or timm/NAME.")
    import timm.optim

    name, known = name.removeprefix("timm/"), [str(known) for known in timm.optim.list_optimizers()]
    if name not in known:
        near = ", ".join(f"timm/{match}" for match in closest(name, map(str, known)))
        raise ValueError(f"--opt {opt!r}: timm has no such optimizer.{near and f' Similar names: {near}.'}")


def check_weights(cfg: OptimConfig, dtype: torch.dtype) -> None:
    """Raise ValueError if the optimizer, or the form of AdamW (`fused_optimizer`), does not support this dtype."""
    form = cfg.fused_optimizer
    if cfg.opt.lower() != "adamw":
        if dtype == torch.float16:
            raise ValueError(
                f"--opt {cfg.opt} keeps its state in the weights' float16, where second moments underflow to 0. Use "
                "--opt adamw, which keeps them in float32, or --precision amp."
            )
        return
    if dtype == torch.float16 and form != "auto":
        raise ValueError(
            f"--fused-optimizer {form} keeps AdamW's second moment in the weights' float16, where it underflows to 0. "
            "Use --fused-optimizer auto, which keeps it in float32, or --precision amp."
        )
    if dtype == torch.bfloat16 and form not in _BFLOAT16_FORMS:
        raise ValueError(
            f"--fused-optimizer {form} does not support bfloat16 weights. Use --fused-optimizer auto, or "
            "--precision amp_bf16, which keeps the weights in float32."
        )


def has_no_decay(name: str, parameter: torch.Tensor) -> bool:
    """Return whether the parameter has no weight decay.

    These are parameters with less than 2 dimensions, or with "bn", "ln", "bias" or "logit_scale" in the name.
    """
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def _adamw(model: nn.Module, cfg: OptimConfig, device: torch.device, is_captured: bool) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if has_no_decay(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not has_no_decay(name, p)], "weight_decay": cfg.wd},
    ]
    options = _given(lr=cfg.lr, betas=_betas(cfg), eps=cfg.eps)
    has_float16 = any(p.dtype == torch.float16 for _, p in named)
    # torch's fused kernel is the fastest, but its moments have the dtype of the weights, and it can skip a step only on
    # some devices.
    kind = devices.get(device)
    if cfg.fused_optimizer == "auto" and (is_captured or has_float16 or not kind.fused_adamw_skips):
        return FlatAdamW(groups, **options)
    return kind.adamw(groups, cfg.fused_optimizer, **options)


def _timm(model: nn.Module, cfg: OptimConfig, name: str) -> torch.optim.Optimizer:
    import timm.optim

    options = _given(lr=cfg.lr, betas=_betas(cfg), eps=cfg.eps, momentum=cfg.momentum)
    return timm.optim.create_optimizer_v2(model, name, weight_decay=cfg.wd, **options)


def _betas(cfg: OptimConfig) -> tuple[float, float] | None:
    if cfg.beta1 is None or cfg.beta2 is None:
        if cfg.beta1 is not cfg.beta2:
            raise ValueError("The optimizer takes its betas as a pair. Set both --beta1 and --beta2, or neither.")
        return None
    return cfg.beta1, cfg.beta2


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _keep_implementation(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace `fused`, `foreach` and so on in the saved groups by those of the optimizer (a pre-hook of loading)."""
    own = [{key: group[key] for key in _IMPLEMENTATION if key in group} for group in optimizer.param_groups]
    saved = state_dict["param_groups"]
    if len(saved) != len(own):
        return state_dict  # torch raises an error that says what differs
    return state_dict | {"param_groups": [group | kept for group, kept in zip(saved, own, strict=True)]}
