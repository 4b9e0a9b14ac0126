"""Has pages of digits read, and compares what comes back with what was drawn.

The workers run elsewhere: `torchrelay up examples/pages/pipeline.yaml`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.pages.draw import Answer, draw_pages, static
from torchrelay import Relay
from torchrelay.errors import JobFailed

PIPELINE = Path(__file__).with_name("pipeline.yaml")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Reads the digits on drawn pages.")
    parser.add_argument("--pages", type=int, default=40, help="how many to draw (%(default)s)")
    options = parser.parse_args(arguments)
    pages = draw_pages(options.pages)
    with Relay() as relay:
        relay.register(PIPELINE)
        *answers, broken = read(relay, [*(p.image for p in pages), static()])
    print("page  digits  boxes right  labels right")
    boxes = labels = total = 0
    for number, (page, answer) in enumerate(zip(pages, answers, strict=True)):
        if isinstance(answer, JobFailed):
            sys.exit(str(answer))
        right = page.answer.keys() & answer.keys()
        labelled = sum(page.answer[box] == answer[box] for box in right)
        print(f"{number:4} {len(page.answer):7} {len(right):12} {labelled:13}")
        boxes, labels, total = boxes + len(right), labels + labelled, total + len(page.answer)
    print(f"static: {broken}")
    print(f"{total} digits: {boxes} boxes and {labels} labels right ({labels / max(total, 1):.1%})")


def read(relay: Relay, images: Sequence[np.ndarray]) -> list[Answer | JobFailed]:
    """What stands on each page, or why it could not be read. All pages are under way at the same time."""
    answers: list[Answer | JobFailed] = []
    for future in relay.submit_many("pages", [{"page": image} for image in images]):
        try:
            result = future.result()
        except JobFailed as error:
            answers.append(error)
        else:
            boxes = (tuple(box.tolist()) for box in result["box"])
            answers.append(dict(zip(boxes, result["digit"].tolist(), strict=True)))
    return answers


if __name__ == "__main__":
    main()
