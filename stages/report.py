"""Make the page that shows what was done: one HTML file that opens from disk, and its numbers.

    clouds --stage report

Leaves `report.html` (self-contained: pictures, styles and script inside, no request leaves it) and
`results.json` (the numbers, without times).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.config import ReportConfig, StageConfig
from stages.contracts import Progress, Summary
from stages.report_changes import measure
from stages.report_curves import read_curves
from stages.report_lineage import Instance, read_instances, read_json
from stages.report_page import Story, compared_models, comparisons, render
from stages.report_pictures import (
    Chain,
    Painted,
    Predicted,
    chain_for,
    label_space,
    painted_pictures,
    predictions,
)
from stages.report_scores import Judged, judge, minus, read_scores
from stages.report_truth import read_quality
from stages.report_words import percent, signed
from stages.shards import Row, read_index, write_json

PAGE_BYTES_MAX = 14_000_000
"""The page stays below this; where pictures are too many or too large they are shown smaller, then
fewer."""

_SIDES_PX = (640, 448, 320, 224)


def run(
    config: StageConfig, *, out: Path, progress: Progress, artifacts: Mapping[str, Path]
) -> Summary:
    """Read the artifacts, write `report.html` and `results.json`.

    Args:
        config: section `report`.
        out: the stage's folder.
        progress: told of the four steps.
        artifacts: instance name -> artifact folder, of everything else in the recipe.

    Raises:
        ValueError: an artifact is not as its contract says; the message names the file.
    """
    # 1. Read what was done
    progress.start(4, "steps")
    story = _read(artifacts)
    progress.advance()

    # 2. Draw the page, with pictures as large as fit
    page, pictures = _page(config.report, story)
    progress.advance()

    # 3. Write the page
    temporary = out / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out / "report.html")
    progress.advance()

    # 4. Write the numbers
    write_json(out / "results.json", _results(config.report, story, *pictures))
    progress.advance()
    return _summary(story, pictures[0], len(page.encode()))


def _read(artifacts: Mapping[str, Path]) -> Story:
    instances = read_instances(artifacts)
    models = read_scores(instances)
    verdict = judge(models)
    chain = chain_for(instances, verdict.model.instance if verdict else None)
    space = label_space(instances, models)
    colours = _colours(instances)
    rows = list(read_index(chain.pictures.folder)) if chain.pictures else []
    return Story(
        instances=instances,
        models=models,
        verdict=verdict,
        chain=chain,
        space=space,
        changes=measure(chain, space),
        quality=read_quality(chain, space),
        charts=read_curves(instances, colours),
        colours=colours,
        num_pictures=len(rows),
        notices=_leaks(models) + _notices(instances, chain, rows),
    )


def _colours(instances: Mapping[str, Instance]) -> dict[str, int]:
    """A colour number per training and judged model: 0 the source, 1 the control, 2.. the legs."""
    legs = sorted(
        {one.leg or "" for one in instances.values() if one.round and one.stage == "self_train"},
        key=lambda leg: (leg != "control", leg != "raw", leg),
    )
    if "control" not in legs:
        legs.insert(0, "control")
    return {
        name: 1 + legs.index(one.leg or "") % 7 if one.round and (one.leg or "") in legs else 0
        for name, one in instances.items()
    }


def _leaks(models: Sequence[Judged]) -> list[str]:
    leaks = {name: score for model in models for name, score in model.targets.items()}
    return [
        f"{score.num_also_in_sources} pictures of target {name} are also in the sources: its score "
        "is no judgement on an unseen domain."
        for name, score in sorted(leaks.items())
        if score.num_also_in_sources
    ]


def _notices(instances: Mapping[str, Instance], chain: Chain, rows: Sequence[Row]) -> list[str]:
    """What a reader must know before believing a number."""
    notices = []
    if any(row.get("untrained") for row in rows):
        notices.append(
            "The painting network has seeded random weights: the painted pictures are noise. They "
            "show that every stage runs; no gain or loss may be read from them."
        )
    elif chain.pictures and chain.pictures.section("synthesize").get("mode") == "collect":
        notices.append("The pictures were collected from unlabelled data, not painted.")
    prompts = _read_statistics(chain.prompts)
    if prompts.get("from_random_writer"):
        notices.append(
            f"{prompts['from_random_writer']} of {prompts.get('num_prompts')} prompts are from a "
            "language model with seeded random weights: chance words."
        )
    if chain.refined and _read_statistics(chain.refined).get(
        "untrained", chain.refined.section("refine").get("weights", "unknown") is None
    ):
        notices.append(
            "SAM has seeded random weights: what refinement changed here is not an improvement."
        )
    kinds = {_without_weights(one) for one in instances.values()}
    if "frozen" in kinds:
        notices.append("The frozen image encoder has random weights: nothing pre-trained is used.")
    elif kinds - {None}:
        notices.append("No pre-trained weights: the image encoder starts from random ones.")
    return notices


def _read_statistics(instance: Instance | None) -> Mapping[str, Any]:
    path = instance.folder / "statistics.json" if instance else None
    return read_json(path) if path and path.is_file() else {}


def _without_weights(one: Instance) -> str | None:
    """How an encoder without pre-trained weights is tuned; None: it has weights, or no encoder."""
    segmenter = one.section("segmenter")
    encoder = segmenter.get("encoder") or {}
    if not encoder or encoder.get("weights") is not None:
        return None
    if str(encoder.get("name", "")).startswith("local-dir:"):
        return None
    return str((segmenter.get("tuning") or {}).get("kind", "frozen"))


def _page(config: ReportConfig, story: Story) -> tuple[str, tuple[list[Painted], list[Predicted]]]:
    """The page below `PAGE_BYTES_MAX`, and the pictures in it."""
    attempts = [(side, 1.0) for side in _SIDES_PX]
    attempts += [(_SIDES_PX[-1], share) for share in (0.5, 0.25, 0.1, 0.0)]
    for side_px, share in attempts:
        painted = painted_pictures(
            story.chain,
            story.instances,
            story.space,
            count=round(config.num_pictures * share),
            side_px=side_px,
        )
        predicted = predictions(
            compared_models(story),
            story.instances,
            story.space,
            per_target=round(12 * share),
            side_px=side_px,
        )
        page = render(story, painted, predicted, title=config.title)
        if len(page.encode()) <= PAGE_BYTES_MAX:
            return page, (painted, predicted)
    raise ValueError(
        f"report: even without pictures the page exceeds {PAGE_BYTES_MAX} bytes; the artifacts' "
        "manifests or tables are too large for one page."
    )


def _results(
    config: ReportConfig, story: Story, painted: Sequence[Painted], predicted: Sequence[Predicted]
) -> dict[str, Any]:
    """The page's numbers; nothing in them depends on when or where the stages ran."""
    compared = comparisons(story)
    return {
        "title": config.title,
        "notices": list(story.notices),
        "headline": story.verdict.model.instance if story.verdict else None,
        "keys": {name: one.key for name, one in sorted(story.instances.items())},
        "classes": list(story.space.names),
        "models": [_model_row(one, compared[one.instance]) for one in story.models],
        "refinement": asdict(story.changes) if story.changes else None,
        "label_quality": asdict(story.quality) if story.quality else None,
        "pictures": [
            {
                "id": one.id,
                "prompt": one.prompt,
                "untrained": one.untrained,
                "changed_share": one.changed_share,
                "kept": one.kept,
            }
            for one in painted
        ],
        "predictions": [
            {
                "dataset": one.dataset,
                "id": one.id,
                "wrong_share": {view.instance: view.wrong_share for view in one.views},
            }
            for one in predicted
        ],
    }


def _model_row(one: Judged, reference: Judged | None) -> dict[str, Any]:
    return {
        "instance": one.instance,
        "label": one.label,
        "kind": one.kind,
        "protocol": dict(one.protocol),
        "miou_mean": one.mean,
        "details": list(one.details),
        "miou": {name: score.miou for name, score in one.targets.items()},
        "iou": {name: list(score.iou) for name, score in one.targets.items()},
        "num_images": {name: score.num_images for name, score in one.targets.items()},
        "compared_with": reference.instance if reference else None,
        "difference": minus(one.mean, reference.mean) if reference else None,
    }


def _summary(story: Story, painted: Sequence[Painted], page_bytes: int) -> Summary:
    numbers: dict[str, float | int | str] = {"pictures": len(painted), "page_bytes": page_bytes}
    text = f"page of {page_bytes / 1e6:.1f} MB with {len(painted)} pictures"
    if story.verdict and story.verdict.model.mean is not None:
        numbers["miou_mean"] = round(100 * story.verdict.model.mean, 2)
        text += f", {story.verdict.model.label} {percent(story.verdict.model.mean)} mIoU"
        if story.verdict.difference is not None:
            text += f" ({signed(story.verdict.difference)})"
    return Summary(text=text, numbers=numbers)
