"""What tests of stages and pipelines need: `run_stage` without a server, `server` and `running` with real ones.

Importing this needs no pytest; its fixtures are in `torchrelay.testing.fixtures`. See docs/testing.md.
"""

from __future__ import annotations

from torchrelay.testing.serving import running, server
from torchrelay.testing.stages import run_stage

__all__ = ["run_stage", "running", "server"]
