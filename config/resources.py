"""`resources` and `hosts` of a stage: what does not go together is reported."""

from __future__ import annotations

import difflib

from torchrelay.config.flow import Report
from torchrelay.config.spec import PipelineSpec, StageConfig

__all__ = ["check_resources"]


def check_resources(spec: PipelineSpec, report: Report) -> None:
    """Reports shares of a GPU that a CPU's stage wants, and stages that `apart` names wrongly."""
    fused = {name: names for names in spec.fuse for name in names}
    for i, stage in enumerate(spec.stages):
        for key in ("compute", "memory") if stage.device == "cpu" else ():
            if getattr(stage.resources, key) is not None:
                text = f"resources.{key} is a GPU's, and the stage runs on device: cpu; {_ADVICE[key]}"
                report(("stages", i, "resources", key), f"stage {stage.name!r}: {text}")
        if isinstance(stage.hosts.apart, list):
            for j, name in enumerate(stage.hosts.apart):
                problem = _wrong(spec, stage, name, fused.get(stage.name, [stage.name]))
                if problem:
                    report(("stages", i, "hosts", "apart", j), f"stage {stage.name!r}: hosts.apart {problem}")


_ADVICE = {"compute": "write device: gpu, or cpus", "memory": "write device: gpu, or host_memory"}


def _wrong(spec: PipelineSpec, stage: StageConfig, name: str, group: list[str]) -> str:
    known = [s.name for s in spec.stages]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"stages are {', '.join(known)}"
        return f"names the unknown stage {name!r:.80}; {hint}"
    if name != stage.name and name in group:
        return f"names {name!r}, and `fuse` puts both into one worker; take one of them out"
    return ""
