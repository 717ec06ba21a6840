"""What a user may ask: the YAML file and its overrides, checked and frozen. Imports no torch, no ray."""

from qlora_ray.config.data import DataConfig, DataSource
from qlora_ray.config.files import base_model_path, bundled_root, find_file
from qlora_ray.config.model import EMBEDDED_BASE, ModelConfig, QuantizationConfig
from qlora_ray.config.read import as_written, flat, load_config, make_config
from qlora_ray.config.sweep import Parameter, SweepConfig
from qlora_ray.config.training import OBJECTIVES, OF_PAIRS, TrainingConfig
from qlora_ray.config.upkeep import WatchdogConfig
from qlora_ray.config.whole import Config
from qlora_ray.config.workers import RUN_NAME

__all__ = [
    "EMBEDDED_BASE",
    "OBJECTIVES",
    "OF_PAIRS",
    "RUN_NAME",
    "Config",
    "DataConfig",
    "DataSource",
    "ModelConfig",
    "Parameter",
    "QuantizationConfig",
    "SweepConfig",
    "TrainingConfig",
    "WatchdogConfig",
    "as_written",
    "base_model_path",
    "bundled_root",
    "find_file",
    "flat",
    "load_config",
    "make_config",
]
