"""What an operator writes: settings and pipeline files, validated. Imports neither redis nor torch."""

from torchrelay.config.graph import Graph, Node
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings, parse_bytes
from torchrelay.config.spec import PipelineSpec, StageConfig
from torchrelay.config.stage_spec import StageSpec
from torchrelay.config.types import ColumnType, parse_type

__all__ = [
    "ColumnType",
    "Graph",
    "Node",
    "Pipeline",
    "PipelineSpec",
    "Settings",
    "StageConfig",
    "StageSpec",
    "parse_bytes",
    "parse_type",
]
