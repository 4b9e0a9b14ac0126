"""What `torchrelay check` finds out by importing a pipeline's stages: that they are stages, and that their args fit."""

from __future__ import annotations

from torchrelay.config.imports import bind_args, import_use
from torchrelay.config.pipeline import Pipeline
from torchrelay.errors import ConfigError
from torchrelay.stages.loading import stage_target

__all__ = ["check_stages"]


def check_stages(pipeline: Pipeline) -> tuple[str, ...]:
    """Every problem of the pipeline's stages as `file:line:column: what; remedy`. Runs the modules, builds no stage."""
    problems: list[str] = []
    # As the file has them: what is wrong with a stage that is cut is not wrong once per part.
    for i, spec in enumerate(pipeline.written.stages):
        if spec.use is None:
            continue  # it only regroups rows
        try:
            found = stage_target(import_use(spec.use, pipeline.base_dir), spec.name)
        except ConfigError as error:
            problems.append(pipeline.problem(("stages", i, "use"), str(error)))
            continue
        for problem in bind_args(found, spec.args):
            problems.append(pipeline.problem(("stages", i, "args"), f"stage {spec.name!r}: {problem}"))
    return tuple(problems)
