"""The configuration of a run: all sections of options, in the order of `--help`.

`training.params.options` declares the options. `training.params.flags` makes the parser from them, and
`training.params.checks` checks values against them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

from training.params.options import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    NaFlexConfig,
    ObjectiveConfig,
    OptimConfig,
    ScheduleConfig,
    UnsupportedConfig,
)

# The groups of --help in their order: title and description. `group` of a section or of an option is a title.
GROUPS = {
    "data": "Training and validation data.",
    "model": "Architecture, initial weights, and which parts are trained.",
    "preprocessing": "Overrides of the preprocessing that belongs to the weights.",
    "images of any shape": "For NaFlex image towers, which take any number of patches.",
    "objective": "The loss. Default: contrastive; CoCa models also get a captioning loss.",
    "optimizer": None,
    "schedule": "Learning rate schedule and length of the run.",
    "device and processes": None,
    "checkpoints": "Written to LOGS/NAME/checkpoints/epoch_N.pt.",
    "evaluation": "The work is split over all processes.",
    "logging": "LOGS/NAME/out.log is the log; results.jsonl has all evaluations.",
    "unsupported": "Options of open_clip that this project does not support. A value other than the default is "
    "an error that says what to use instead. --torchscript is ignored with a warning.",
}


@dataclass(frozen=True)
class TrainConfig:
    """All sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    naflex: NaFlexConfig = field(default_factory=NaFlexConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


SECTIONS: tuple[Any, ...] = (*get_type_hints(TrainConfig).values(), UnsupportedConfig)


def default_values() -> dict[str, Any]:
    """Return the default of every option, by name."""
    return {name: value for section in SECTIONS for name, value in asdict(section()).items()}


def get_default_params(model_name: str) -> dict[str, float]:
    """Return AdamW's lr, beta1, beta2 and eps for a model, from the CLIP paper (arXiv:2103.00020, table 18)."""
    is_vit = "vit" in model_name.lower()
    return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98 if is_vit else 0.999, "eps": 1e-6 if is_vit else 1e-8}
