"""A stage that sleeps for each row, and for another time once a file is there."""

from __future__ import annotations

import os
import time
from typing import Any

from torchrelay import Batch, Stage


class Sleep(Stage):
    """`before_s` a row; `after_s` once `flag` is there."""

    def __init__(self, before_s: float, after_s: float, flag: str) -> None:
        self.before_s = before_s
        self.after_s = after_s
        self.flag = flag

    def forward(self, batch: Batch) -> dict[str, Any]:
        time.sleep(len(batch) * (self.after_s if os.path.exists(self.flag) else self.before_s))
        return {"n": batch["n"]}
