"""A toy stage: numbers in shards, slowly if asked; real work for the engine's tests, no torch."""

import os
import signal
import time
from pathlib import Path

from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.shards import ShardJob, item_seed, write_shards


def shards(config: StageConfig, *, progress: Progress) -> ShardJob:
    """`toy.count` files that hold one number each."""
    toy = config.toy

    def at_work(progress: Progress):
        def work(items, folder):
            for item in items:
                misbehave(item, folder)
                time.sleep(float(os.environ.get("TOY_PAUSE_S", "0")))
                number = item_seed(config.seed, item) % toy.modulus
                (folder / f"{item}.txt").write_text(str(number))
                progress.advance()
            return [{"id": item} for item in items]

        return work

    return ShardJob(items=range(toy.count), shard_size=toy.shard_size, unit="numbers", open=at_work)


def misbehave(item: int, folder: Path) -> None:
    """Fail at the item that the environment names; TOY_KILL_ONCE and TOY_HANG_ONCE only once."""
    named = {
        name for name in os.environ if name.startswith("TOY_") and os.environ[name] == str(item)
    }
    once = folder.parent / f".misbehaved-{item}"
    if {"TOY_KILL_ONCE", "TOY_HANG_ONCE"} & named:
        if once.exists():
            return
        once.touch()
    if "TOY_FAIL_AT" in named:
        raise ValueError(f"item {item} is bad")
    if {"TOY_KILL_AT", "TOY_KILL_ONCE"} & named:
        os.kill(os.getpid(), signal.SIGKILL)
    if "TOY_HANG_ONCE" in named:
        time.sleep(600)


def run(config: StageConfig, *, out: Path, progress: Progress) -> Summary:
    """Make the shards, and a log that does not count."""
    num_shards = write_shards(out, shards(config, progress=progress), progress=progress)
    (out / "logs").mkdir(exist_ok=True)
    (out / "logs" / "when.txt").write_text(str(time.time_ns()))
    return Summary(text=f"{config.toy.count} numbers, {num_shards} shards")
