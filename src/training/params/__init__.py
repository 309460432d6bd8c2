"""The options of the training command."""

from training.params.checks import validate
from training.params.config import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    default_values,
    get_default_params,
    parse_args,
    sections,
    warnings_for,
)
from training.params.flags import ParseKwargs

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParseKwargs",
    "ScheduleConfig",
    "TrainConfig",
    "default_values",
    "get_default_params",
    "parse_args",
    "sections",
    "validate",
    "warnings_for",
]
