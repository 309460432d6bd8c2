"""The sections of options: one frozen dataclass per component, one field per option.

A field is the only place where an option has its name, type, default, help text and allowed values (see
`training.params.option`). To add an option, add a field here, and its default to `tests/parity/test_flags.py`.
"""

from training.params.options.data import DATASET_TYPES, DataConfig
from training.params.options.distributed import DistributedConfig
from training.params.options.model import ModelConfig
from training.params.options.naflex import NaFlexConfig
from training.params.options.objective import ObjectiveConfig
from training.params.options.optim import TORCH_OPTIMIZERS, OptimConfig, ScheduleConfig
from training.params.options.outputs import CheckpointConfig, EvalConfig, LoggingConfig
from training.params.options.unsupported import UnsupportedConfig

__all__ = [
    "DATASET_TYPES",
    "TORCH_OPTIMIZERS",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "LoggingConfig",
    "ModelConfig",
    "NaFlexConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ScheduleConfig",
    "UnsupportedConfig",
]
