"""What an operator writes: settings and pipeline files, validated. Imports neither redis nor torch."""

from torchrelay.config.pipeline import Pipeline
from torchrelay.config.settings import Settings
from torchrelay.config.spec import StageSpec

__all__ = ["Pipeline", "Settings", "StageSpec"]
