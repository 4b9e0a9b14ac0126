"""One model as N consecutive parts (`shards: {mode: pipeline}`): where it is cut, and a part at work.

`make_plan` works out the cuts once: the model's call is captured (`calls`, `samples`), traced with torch.export
(`tracing`), or, where that does not go, looked at as a chain of modules (`modules`), measured, and cut evenly
(`balance`). `PartStage` is one part in a worker: `pieces` and `modules` compute it, `crossing` has the form of what
goes from a part to the next. Knows nothing of Redis, and nothing of how parts are placed.
"""

from torchrelay.stages.splitting.making import make_plan
from torchrelay.stages.splitting.part import PartStage
from torchrelay.stages.splitting.plan import Part, SplitPlan

__all__ = ["Part", "PartStage", "SplitPlan", "make_plan"]
