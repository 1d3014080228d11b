"""Choose which pictures are kept for self-training, with scores and reasons.

    clouds --stage select --set select.rule=checks --set select.keep_share=0.8

Rule `all` keeps every picture; `confidence` those whose label the teacher is surest of; `checks`
drops blank pictures, near copies, those that do not fit their prompt, and those the teacher is
unsure of, each by a threshold of its own. What the painter's safety checker flagged is black, and
no rule keeps it.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

from models.likeness import NearCopies
from stages.config import SelectConfig, StageConfig
from stages.contracts import Progress, Summary
from stages.devices import choose_device
from stages.picture_scores import PictureScore, measure
from stages.shards import Row, write_json, write_jsonl

NOT_NEEDED = "spare and not needed"
"""Reason of a good spare picture that no dropped one made room for."""
FLAGGED = "flagged by the safety checker"
"""Reason of a picture that the painter's own checker made black."""


def run(
    config: StageConfig, *, out: Path, progress: Progress, pictures: Path, labels: Path
) -> Summary:
    """Write `selection.jsonl` (one row per picture, in their order) and `statistics.json`.

    Args:
        config: reads `select`.
        out: the stage's folder.
        progress: told each picture.
        pictures: artifact of `synthesize`.
        labels: artifact of `pseudo_label`.

    Raises:
        FileNotFoundError: the CLIP is not to be had.
        ValueError: pictures and labels do not pair, or no picture (or too few) is kept.
    """
    section = config.select
    device = choose_device(config).device
    scores = measure(pictures, labels, section=section, device=device, progress=progress)
    rows = judge(scores, section)
    statistics = _statistics(rows, scores)
    _check_kept(statistics, scores, section)
    _say_if_few(statistics, progress)
    write_jsonl(out / "selection.jsonl", rows)
    write_json(out / "statistics.json", statistics)
    num_kept = statistics["num_kept"]
    return Summary(
        text=f"{num_kept} of {len(rows)} pictures kept (rule {section.rule}){_told(statistics)}",
        numbers={"pictures": len(rows), "kept": num_kept},
    )


def judge(scores: Sequence[PictureScore], section: SelectConfig) -> list[Row]:
    """Decide on every picture, in order.

    Of near copies the first that passes everything else is kept. `keep_share` counts over all
    pictures (ties: by order; flagged ones last). A spare picture is kept only in the place of a
    dropped one: of the same prompt if there is one, else the first.
    """
    num_best = max(1, round(section.keep_share * len(scores)))
    ranked = sorted(
        range(len(scores)),
        key=lambda place: (scores[place].flagged, -scores[place].mean_confidence, place),
    )
    best = {scores[place].id for place in ranked[:num_best]}
    bits = section.twin_bits if section.rule == "checks" else None
    copies = NearCopies(bits=bits) if bits is not None else None
    kept_ids: list[str] = []
    rows = []
    for score in scores:
        reasons = _reasons(score, section, among_best=score.id in best)
        twin = None
        if not reasons and copies is not None:
            place = copies.nearest(score.hash)
            if place is None:
                copies.add(score.hash)
                kept_ids.append(score.id)
            else:
                twin = kept_ids[place]
                reasons.append("near copy of another picture")
        rows.append(_row(score, reasons, twin))
    _place_spares(rows, scores)
    return rows


def _place_spares(rows: Sequence[Row], scores: Sequence[PictureScore]) -> None:
    """Let good spare pictures stand in for dropped ones; drop the rest of them."""
    good = [place for place, score in enumerate(scores) if score.spare and rows[place]["kept"]]
    dropped = [
        place for place, score in enumerate(scores) if not score.spare and not rows[place]["kept"]
    ]
    of_prompt: defaultdict[str | None, deque[int]] = defaultdict(deque)
    for place in good:
        of_prompt[scores[place].prompt_id].append(place)
    stand_ins, unserved = {}, []
    for place in dropped:
        if own := of_prompt[scores[place].prompt_id]:
            stand_ins[own.popleft()] = place
        else:
            unserved.append(place)
    free = [place for place in good if place not in stand_ins]
    stand_ins |= zip(free, unserved, strict=False)
    for place in good:
        if place in stand_ins:
            rows[place]["replaces"] = rows[stand_ins[place]]["id"]
        else:
            rows[place] |= {"kept": False, "reasons": [NOT_NEEDED]}


def _reasons(score: PictureScore, section: SelectConfig, *, among_best: bool) -> list[str]:
    """Every threshold that a picture fails."""
    if score.flagged:
        return [FLAGGED]
    if section.rule == "all":
        return []
    faults = {
        f"mean confidence below {section.min_confidence:g}": score.mean_confidence
        < section.min_confidence,
        f"not among the best {section.keep_share:.0%}": not among_best,
    }
    if section.rule == "checks":
        faults |= {
            f"less than {section.min_sure_share:.0%} sure pixels": score.sure_share
            < section.min_sure_share,
            f"fewer than {section.min_classes} classes": score.num_classes < section.min_classes,
            f"contrast below {section.min_contrast:g}": score.contrast < section.min_contrast,
            f"similarity to the prompt below {section.min_similarity:g}": score.similarity
            is not None
            and score.similarity < section.min_similarity,
        }
    return [reason for reason, failed in faults.items() if failed]


def _row(score: PictureScore, reasons: Sequence[str], twin: str | None) -> Row:
    measured = {
        "mean_confidence": score.mean_confidence,
        "sure_share": score.sure_share,
        "num_classes": score.num_classes,
        "contrast": score.contrast,
        "similarity": score.similarity,
    }
    row = {
        "id": score.id,
        "kept": not reasons,
        "scores": {name: round(value, 6) for name, value in measured.items() if value is not None},
        "reasons": list(reasons),
    }
    return row | ({"twin": twin} if twin is not None else {})


def _statistics(rows: Sequence[Row], scores: Sequence[PictureScore]) -> Row:
    reasons = Counter(reason for row in rows for reason in row["reasons"])
    found = {
        "num_pictures": len(rows),
        "num_kept": sum(row["kept"] for row in rows),
        "reasons": dict(sorted(reasons.items())),
    }
    painted = sum(score.spare for score in scores)
    used = sum("replaces" in row for row in rows)
    return found | ({"spares": {"painted": painted, "used": used}} if painted else {})


def _told(statistics: Row) -> str:
    spares = statistics.get("spares")
    return f", {spares['used']} of {spares['painted']} spare ones used" if spares else ""


def _say_if_few(statistics: Row, progress: Progress) -> None:
    """Spares were wanted so that none is missing: say so if some are."""
    spares = statistics.get("spares")
    if spares is None:
        return
    asked = statistics["num_pictures"] - spares["painted"]
    if missing := asked - statistics["num_kept"]:
        progress.note(
            f"{missing} of {asked} pictures are dropped and no good spare one is left: paint more "
            "(synthesize.spare), or loosen select"
        )


def _check_kept(statistics: Row, scores: Sequence[PictureScore], section: SelectConfig) -> None:
    num_kept, total = statistics["num_kept"], statistics["num_pictures"]
    asked = total - statistics.get("spares", {}).get("painted", 0)
    if num_kept and num_kept / asked >= section.min_kept_share:
        return
    best = max(score.mean_confidence for score in scores)
    reasons = "; ".join(f"{count} {reason}" for reason, count in statistics["reasons"].items())
    wanted = f", fewer than the {section.min_kept_share:.0%} of select.min_kept_share"
    raise ValueError(
        f"select keeps {num_kept or 'none'} of {total} pictures{wanted if num_kept else ''}. Why: "
        f"{reasons}. The best mean confidence is {best:.3f}. Loosen the thresholds, paint spare "
        "pictures (synthesize.spare) or train the teacher longer."
    )
