"""Has two models and their mean read the digits that neither has seen, and prints how often each is right.

The workers run elsewhere: `torchrelay up examples/ensemble/pipeline.yaml`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.ensemble.stages import split_digits
from torchrelay import Relay

PIPELINE = Path(__file__).with_name("pipeline.yaml")


def main() -> None:
    _, _, images, digits = split_digits()
    with Relay() as relay:
        relay.register(PIPELINE)
        results = list(relay.map("ensemble", ({"image": image} for image in images)))
    for name in ("neighbours", "network", "digit"):
        right = np.mean([result[name] == digit for result, digit in zip(results, digits, strict=True)])
        print(f"{'both' if name == 'digit' else name:10} {right:.1%} right")
    together = busy_together(np.array([result["ran"] for result in results]))
    print(f"both models were at work at the same time for {together * 1e3:.0f} ms")


def busy_together(ran: np.ndarray) -> float:
    """Seconds in which both branches computed. `ran`: float64 `[N, 2, 2]`, start and end per row and branch."""
    one, other = (np.unique(ran[:, branch], axis=0) for branch in (0, 1))
    starts = np.maximum.outer(one[:, 0], other[:, 0])
    ends = np.minimum.outer(one[:, 1], other[:, 1])
    return float(np.maximum(ends - starts, 0).sum())


if __name__ == "__main__":
    main()
