"""The options of the training command.

`options` declares them. `parse_args` reads the command line into a flat namespace, and `sections` splits it into a
`TrainConfig`, whose sections the components take.
"""

from training.params.checks import validate
from training.params.config import TrainConfig, default_values, get_default_params
from training.params.flags import ParseKwargs
from training.params.like_4 import describe as describe_like_4
from training.params.namespace import parse_args, read_section, sections, warnings_for
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
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "LoggingConfig",
    "ModelConfig",
    "NaFlexConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParseKwargs",
    "ScheduleConfig",
    "TrainConfig",
    "default_values",
    "describe_like_4",
    "get_default_params",
    "parse_args",
    "read_section",
    "sections",
    "validate",
    "warnings_for",
]
