"""A toy stage: the sum of the numbers, rounded (so that small changes are cut off early)."""

from pathlib import Path

from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.shards import read_index


def run(config: StageConfig, *, out: Path, progress: Progress, numbers: Path) -> Summary:
    """Write the sum of all numbers, in units of `total.unit`."""
    rows = list(read_index(numbers))
    progress.start(len(rows), "numbers")
    total = sum(int((row["folder"] / f"{row['id']}.txt").read_text()) for row in rows)
    progress.advance(len(rows))
    (out / "sum.txt").write_text(str(total // config.total.unit))
    return Summary(text=f"sum {total}", numbers={"sum": total})
