"""A toy stage: a leg's view of the sum, and a last one that takes everything."""

from collections.abc import Mapping
from pathlib import Path

from stages.config import StageConfig
from stages.contracts import Progress, Summary


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    sum: Path | None = None,
    before: Path | None = None,
    artifacts: Mapping[str, Path] | None = None,
) -> Summary:
    """Write a line per input."""
    if artifacts is not None:
        lines = [
            f"{name} {(folder / 'manifest.json').is_file()}" for name, folder in artifacts.items()
        ]
        (out / "report.html").write_text("\n".join(lines))
        return Summary(text=f"{len(artifacts)} artifacts")
    value = int((sum / "sum.txt").read_text())
    earlier = (
        int((before / "share.txt").read_text())
        if before and (before / "share.txt").is_file()
        else 0
    )
    (out / "share.txt").write_text(str(value * config.share.factor + earlier))
    return Summary(text=f"round {config.round}")
