"""A run as dataclasses: read from TOML, checked, and written back resolved beside every result."""

from fastsft.config.data import (
    FIELD_NAMES,
    DataOptions,
    DecontaminateOptions,
    DedupOptions,
    FilterOptions,
    FimOptions,
    SourceOptions,
    WeightOptions,
)
from fastsft.config.errors import ConfigError, unknown_key
from fastsft.config.load import load_config, to_dict, to_json
from fastsft.config.run import (
    Config,
    DraftOptions,
    LoraOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimOptions,
    ScheduleOptions,
    StageOptions,
    TokenizerOptions,
    TrainOptions,
)
from fastsft.config.watching import EvalOptions, LogOptions, SamplesOptions

__all__ = [
    "FIELD_NAMES",
    "Config",
    "ConfigError",
    "DataOptions",
    "DecontaminateOptions",
    "DedupOptions",
    "DraftOptions",
    "EvalOptions",
    "FilterOptions",
    "FimOptions",
    "LogOptions",
    "LoraOptions",
    "ModelOptions",
    "ObjectiveOptions",
    "OptimOptions",
    "SamplesOptions",
    "ScheduleOptions",
    "SourceOptions",
    "StageOptions",
    "TokenizerOptions",
    "TrainOptions",
    "WeightOptions",
    "load_config",
    "to_dict",
    "to_json",
    "unknown_key",
]
