"""Choose which pictures are kept for self-training, with scores and reasons.

    clouds --stage select --set select.rule=confidence --set select.keep_share=0.8

Rule `all` keeps every picture; rule `confidence` keeps those whose label the teacher is surest of.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.config import SelectConfig, StageConfig
from stages.contracts import Progress, Summary
from stages.shards import Row, read_index, write_json, write_jsonl


def run(
    config: StageConfig, *, out: Path, progress: Progress, pictures: Path, labels: Path
) -> Summary:
    """Write `selection.jsonl` (one row per picture, in their order) and `statistics.json`.

    Args:
        config: reads `select`.
        out: the stage's folder.
        progress: told the pictures.
        pictures: artifact of `synthesize`.
        labels: artifact of `pseudo_label`.

    Raises:
        ValueError: pictures and labels do not pair, or no picture is kept.
    """
    ids = [row["id"] for row in read_index(pictures)]
    confidences = {row["id"]: float(row["mean_confidence"]) for row in read_index(labels)}
    progress.start(len(ids), "pictures")
    _check_pairs(ids, confidences)
    rows = judge(ids, confidences, config.select)
    if not any(row["kept"] for row in rows):
        best = max(confidences.values(), default=0.0)
        raise ValueError(
            f"select keeps none of {len(rows)} pictures (the best mean confidence is {best:.3f}, "
            f"select.min_confidence {config.select.min_confidence}): lower it, or train the "
            "teacher longer."
        )
    write_jsonl(out / "selection.jsonl", rows)
    write_json(out / "statistics.json", _statistics(rows))
    progress.advance(len(rows))
    num_kept = sum(row["kept"] for row in rows)
    return Summary(
        text=f"{num_kept} of {len(rows)} pictures kept (rule {config.select.rule})",
        numbers={"pictures": len(rows), "kept": num_kept},
    )


def _check_pairs(ids: Sequence[str], confidences: Mapping[str, float]) -> None:
    strays = sorted(set(ids) ^ confidences.keys())
    if strays or not ids:
        raise ValueError(
            f"pictures ({len(ids)}) and labels ({len(confidences)}) do not pair"
            + (f" (the first without its other half: {strays[0]})" if strays else "")
            + ": run `clouds --from synthesize`."
        )


def judge(ids: Sequence[str], confidences: Mapping[str, float], section: SelectConfig) -> list[Row]:
    """Decide on every picture.

    Under rule "confidence" a picture is dropped if its mean confidence is below
    `min_confidence`, or if it is not among the best `keep_share` of all pictures (ties: by order).
    """
    num_best = max(1, round(section.keep_share * len(ids)))
    ranked = sorted(range(len(ids)), key=lambda place: (-confidences[ids[place]], place))
    best = {ids[place] for place in ranked[:num_best]}
    rows = []
    for name in ids:
        reasons = []
        if section.rule == "confidence":
            if confidences[name] < section.min_confidence:
                reasons.append(f"mean confidence below {section.min_confidence:g}")
            if name not in best:
                reasons.append(f"not among the best {section.keep_share:.0%}")
        rows.append(
            {
                "id": name,
                "kept": not reasons,
                "scores": {"mean_confidence": confidences[name]},
                "reasons": reasons,
            }
        )
    return rows


def _statistics(rows: Sequence[Row]) -> Row:
    reasons = Counter(reason for row in rows for reason in row["reasons"])
    return {
        "num_pictures": len(rows),
        "num_kept": sum(row["kept"] for row in rows),
        "reasons": dict(sorted(reasons.items())),
    }
