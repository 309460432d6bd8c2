"""The optimizer of a run: AdamW, NAdam with decoupled weight decay, or one of timm's."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn

from open_clip import device as devices
from open_clip.config import closest
from training.flat_adamw import FlatAdamW
from training.parameter_groups import build_groups, grouping_of, log_groups
from training.params import OptimConfig
from training.params.options import TORCH_OPTIMIZERS

logger = logging.getLogger(__name__)

# Options for the implementation. They depend on the device, so they are not taken from a checkpoint.
_IMPLEMENTATION = {"fused", "foreach", "capturable", "differentiable"}
# Arguments of optimizers that have a flag of their own.
_FLAG_OF = {
    "lr": "--lr",
    "weight_decay": "--wd",
    "betas": "--beta1 and --beta2",
    "eps": "--eps",
    "momentum": "--momentum",
}
_BFLOAT16_FORMS = ("auto", "torch", "off")


def create_optimizer(
    model: nn.Module, cfg: OptimConfig, device: torch.device | str, is_captured: bool = False
) -> torch.optim.Optimizer:
    """Create the optimizer for the trainable parameters.

    Its state dict is compatible with open_clip's: same groups, same order of parameters. It is also compatible between
    fused and unfused implementations: `load_state_dict` keeps the implementation of this optimizer. A group with an
    "lr_scale" has this multiple of the learning rate, from the start and in all schedules.

    Args:
        model: the bare module, already on its device. It must not be wrapped by DDP, whose prefix hides the names that
            timm excludes from weight decay.
        cfg: options that are None get the default of AdamW or timm.
        device: device of the model. Together with the dtype of the weights it decides what `fused_optimizer="auto"` is.
        is_captured: the step will be part of a compiled graph, so "auto" is FlatAdamW, which torch.compile can trace.

    Raises:
        ValueError: the optimizer is unknown or does not take an option, does not support the device or the dtype of
            the weights, or the model has no trainable parameters.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("The model has no trainable parameters. Unlock a part of it (see --lock-image, --lock-text).")
    check_name(cfg.opt)
    check_options(cfg)
    for dtype in {p.dtype for p in model.parameters() if p.requires_grad}:
        check_weights(cfg, dtype)
    opt = cfg.opt.lower()
    if opt == "adamw":
        optimizer = _adamw(model, cfg, torch.device(device), is_captured)
    elif opt == "nadamw":
        groups = build_groups(model, grouping_of(cfg), cfg.wd)
        optimizer = torch.optim.NAdam(groups, decoupled_weight_decay=True, **_hyperparameters(cfg))
    else:
        optimizer = _timm(model, cfg, opt.removeprefix("timm/"))
    _scale_rates(optimizer, cfg)
    log_groups(optimizer)
    optimizer.register_load_state_dict_pre_hook(_keep_implementation)
    return optimizer


def check_name(opt: str) -> None:
    """Raise ValueError unless `opt` is an optimizer of torch, or "timm/NAME" with the name of an optimizer of timm."""
    name = opt.lower()
    if name in TORCH_OPTIMIZERS:
        return
    if not name.startswith("timm/"):
        raise ValueError(f"Unknown --opt {opt!r}. Use adamw, nadamw or timm/NAME.")
    import timm.optim

    name, known = name.removeprefix("timm/"), [str(known) for known in timm.optim.list_optimizers()]
    if name not in known:
        near = ", ".join(f"timm/{match}" for match in closest(name, map(str, known)))
        raise ValueError(f"--opt {opt!r}: timm has no such optimizer.{near and f' Similar names: {near}.'}")


def check_options(cfg: OptimConfig) -> None:
    """Check --opt-kwargs and --opt-fallback-list.

    Raises:
        ValueError: the optimizer does not take one of the arguments, a flag sets it, or the optimizer has no fallback.
    """
    name, given = cfg.opt.lower(), cfg.opt_kwargs
    if cfg.opt_fallback_list and name in TORCH_OPTIMIZERS:
        raise ValueError(
            f"--opt-fallback-list belongs to timm's optimizers of the Muon family, and --opt is {cfg.opt}. Leave it "
            "out, or use --opt timm/muon."
        )
    if not given and not cfg.opt_fallback_list:
        return
    taken = _arguments(name)
    if cfg.opt_fallback_list and not taken & {"fallback_lr_scale", "adamw_lr"}:
        logger.warning("--opt-fallback-list has no effect: %s has no fallback optimizer. timm/muon has one.", cfg.opt)
    for key, value in given.items():
        if key in _FLAG_OF:
            raise ValueError(f"--opt-kwargs {key}={value}: use {_FLAG_OF[key]} instead.")
        if key not in taken:
            names = ", ".join(sorted(taken - _FLAG_OF.keys())) or "none"
            raise ValueError(f"--opt-kwargs {key}={value}: --opt {cfg.opt} takes no {key}. It takes: {names}.")


def _arguments(name: str) -> set[str]:
    """Return the names of the arguments that an optimizer takes, without those that --opt and other flags decide."""
    if name == "adamw":
        return set(inspect.signature(torch.optim.AdamW).parameters) - {"params", *_IMPLEMENTATION}
    if name == "nadamw":
        return set(inspect.signature(torch.optim.NAdam).parameters) - {"params", "decoupled_weight_decay"}
    import timm.optim

    # For names such as lookahead_adamw, those of the inner optimizer.
    kind: Any = timm.optim.get_optimizer_class(name.removeprefix("timm/").split("_")[-1], bind_defaults=False)
    return set(inspect.signature(kind).parameters) - {"params", "args", "kwargs"}


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
    if dtype == torch.float16 and (form != "auto" or cfg.opt_kwargs):
        given = "--opt-kwargs" if cfg.opt_kwargs else f"--fused-optimizer {form}"
        raise ValueError(
            f"{given} keeps AdamW's second moment in the weights' float16, where it underflows to 0. "
            "Use --fused-optimizer auto without --opt-kwargs, which keeps it in float32, or --precision amp."
        )
    if dtype == torch.bfloat16 and form not in _BFLOAT16_FORMS:
        raise ValueError(
            f"--fused-optimizer {form} does not support bfloat16 weights. Use --fused-optimizer auto, or "
            "--precision amp_bf16, which keeps the weights in float32."
        )


def _adamw(model: nn.Module, cfg: OptimConfig, device: torch.device, is_captured: bool) -> torch.optim.Optimizer:
    groups = build_groups(model, grouping_of(cfg), cfg.wd)
    options = _hyperparameters(cfg)
    has_float16 = any(p.dtype == torch.float16 for group in groups for p in group["params"])
    # torch's fused kernel is the fastest, but its moments have the dtype of the weights, and it can skip a step only on
    # some devices.
    kind = devices.get(device)
    is_flat = cfg.fused_optimizer == "auto" and (is_captured or has_float16 or not kind.fused_adamw_skips)
    if is_flat and not cfg.opt_kwargs:  # FlatAdamW has neither amsgrad nor maximize
        return FlatAdamW(groups, **options)
    return kind.adamw(groups, cfg.fused_optimizer, **options)


def _timm(model: nn.Module, cfg: OptimConfig, name: str) -> torch.optim.Optimizer:
    import timm.optim

    options = _given(momentum=cfg.momentum) | _hyperparameters(cfg)
    grouping = grouping_of(cfg)
    # timm's own groups are those of open_clip 3.3.0 with --opt timm/NAME.
    grouped: Any = model if grouping.is_of_3_3 else build_groups(model, grouping, cfg.wd)
    return timm.optim.create_optimizer_v2(grouped, name, weight_decay=cfg.wd, **options)


def _scale_rates(optimizer: torch.optim.Optimizer, cfg: OptimConfig) -> None:
    """Multiply the learning rates by the groups' "lr_scale". Schedules do the same at each step."""
    for group in optimizer.param_groups:
        if "lr_scale" in group:
            if group["lr"] is None:
                raise ValueError(f"Layer decay needs a learning rate, and --opt {cfg.opt} has none. Set --lr.")
            group["lr"] *= group["lr_scale"]


def _hyperparameters(cfg: OptimConfig) -> dict[str, Any]:
    return _given(lr=cfg.lr, betas=_betas(cfg), eps=cfg.eps) | cfg.opt_kwargs


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
    own = [{key: group[key] for key in sorted(_IMPLEMENTATION) if key in group} for group in optimizer.param_groups]
    saved = state_dict["param_groups"]
    if len(saved) != len(own):
        return state_dict  # torch raises an error that says what differs
    return state_dict | {"param_groups": [group | kept for group, kept in zip(saved, own, strict=True)]}
