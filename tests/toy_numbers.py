"""A toy stage: numbers in shards, slowly if asked; real work for the engine's tests, no torch."""

import os
import signal
import time
from pathlib import Path

from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.shards import item_seed, write_shards


def run(config: StageConfig, *, out: Path, progress: Progress) -> Summary:
    """Write `toy.count` files that hold one number each."""
    toy = config.toy

    def work(items, folder):
        for item in items:
            if os.environ.get("TOY_FAIL_AT") == str(item):
                raise ValueError(f"item {item} is bad")
            if os.environ.get("TOY_KILL_AT") == str(item):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(float(os.environ.get("TOY_PAUSE_S", "0")))
            (folder / f"{item}.txt").write_text(str(item_seed(config.seed, item) % toy.modulus))
            progress.advance()
        return [{"id": item} for item in items]

    num_shards = write_shards(
        out,
        range(toy.count),
        shard_size=toy.shard_size,
        work=work,
        progress=progress,
        unit="numbers",
    )
    (out / "logs").mkdir(exist_ok=True)
    (out / "logs" / "when.txt").write_text(str(time.time_ns()))
    return Summary(text=f"{toy.count} numbers, {num_shards} shards")
