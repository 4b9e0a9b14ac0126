"""Blocks that are used again under a reader that was stopped: it always finds out, and frees nothing of the next."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.queues.arena.conftest import MIB, Server
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.arena.writer import ArenaLimits, ArenaWriter

CYCLES = 4000
# Shows the block, waits for a line in the middle of it, uses the bytes, checks, and releases too late.
READER = """
import sys
from pathlib import Path
import numpy as np
from torchrelay.queues.arena.home import ArenaHome
from torchrelay.queues.arena.reader import ArenaReader
from torchrelay.queues.job import Place

reader = ArenaReader(ArenaHome(Path(sys.argv[1]), int(sys.argv[2])))
for line in sys.stdin:
    arena, *numbers = line.split()
    segment, slot, generation, offset, nbytes, fill, waits = map(int, numbers)
    place = Place(reader.host, arena, segment, slot, generation, offset)
    view = reader.view(place, nbytes)
    if waits:
        print("seen" if view is not None else "gone", flush=True)
        sys.stdin.readline()
    if view is None:
        print("refused", flush=True)
        continue
    changed = bool((np.frombuffer(view, np.uint8) != fill).any())
    intact = reader.intact(place)
    reader.release(place, 0)
    print("intact" if intact else "stale", "changed" if changed else "same", flush=True)
"""


def test_4000_forced_reuses_against_a_stopped_reader_are_all_detected(
    home: ArenaHome, server_of_blocks: Server, reader: ArenaReader
) -> None:
    """A block is used again while its reader waits in the middle, or runs on, or is stopped by a signal. Never are
    changed bytes called intact; always is a reused block called stale; the next block keeps its place and bytes."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    writer = ArenaWriter(home, ArenaLimits(4 * MIB, MIB, 2 * MIB), server_of_blocks)
    command = [sys.executable, "-c", READER, str(home.folder), str(home.host)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert child.stdin is not None
    assert child.stdout is not None
    answers = {"intact same": 0, "stale same": 0, "stale changed": 0, "refused": 0}
    reused = 0
    try:
        while reused < CYCLES:
            nbytes, fill = rng.choice((5000, 20_000, 70_000)), rng.randrange(1, 250)
            place = writer.put("j.1.f.x", 0, bytes([fill]) * nbytes, 1)
            assert place is not None
            how = rng.choice(("waits", "waits", "waits", "races", "stopped", "left alone"))
            waits = how in ("waits", "left alone")
            words = (*place[1:], nbytes, fill, int(waits))
            child.stdin.write(" ".join(map(str, words)) + "\n")
            if waits:
                assert child.stdout.readline() == "seen\n"
            elif how == "stopped":
                time.sleep(rng.random() * 1e-4)
                os.kill(child.pid, signal.SIGSTOP)
            next_place = place
            if how != "left alone":
                # As when another worker did the job and released the block: it is free at once.
                reused += 1
                writer.free([place])
                found = writer.put("j.1.f.y", 0, bytes([fill + 1]) * nbytes, 1)
                assert found is not None
                next_place = found
                assert (next_place.slot, next_place.offset) == (place.slot, place.offset)
            if how == "stopped":
                os.kill(child.pid, signal.SIGCONT)
            if waits:
                child.stdin.write("go\n")
            answer = child.stdout.readline().strip()
            answers[answer] += 1
            assert answer != "intact same" or how in ("races", "stopped", "left alone")
            assert answer == "intact same" or how != "left alone"
            writer.publish([next_place])
            writer.tend()
            view = reader.view(next_place, nbytes)
            # A release of its own generation freed it; one of an older generation frees nothing.
            assert (view is None) == (how == "left alone")
            if view is not None:
                assert bytes(view) == bytes([fill + 1]) * nbytes
                reader.release(next_place, 0)
                del view
                writer.tend()
    finally:
        child.stdin.close()
        child.wait(10)
        print(answers)
        writer.close()
    assert answers["stale changed"] > CYCLES // 4
    assert not list(Path(home.folder).glob("*.data"))
