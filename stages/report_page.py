"""Draw a report's page from its story: everything the templates show, worked out beforehand."""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.charts import LineChart, line_chart
from stages.labels import LabelSpace
from stages.report_changes import Changes
from stages.report_lineage import BOX_HEIGHT, BOX_WIDTH, Instance, draw, state_of
from stages.report_pictures import Chain, Painted, Predicted, class_name
from stages.report_scores import Judged, Number, Verdict, minus, source_of
from stages.report_truth import LabelQuality
from stages.report_words import as_json, duration, moment, percent, plain, signed, size_of, tone

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_STATE_WORDS = {"ran": "ran", "cached": "cached", "shared": "shared", "unknown": "made"}
_STATE_LEGEND = {
    "ran": "ran for this page",
    "cached": "done before and used again (its own duration is given)",
    "shared": "another leg’s artifact, which serves here as well",
    "unknown": "made at the time given; its artifact does not name the run",
}


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything the page tells, pictures aside."""

    instances: Mapping[str, Instance]
    models: Sequence[Judged]
    verdict: Verdict | None
    chain: Chain
    space: LabelSpace
    changes: Changes | None
    quality: LabelQuality | None
    charts: Sequence[LineChart]
    colours: Mapping[str, int]
    """Colour number of every instance."""
    num_pictures: int
    """Pictures there are, shown or not."""
    notices: Sequence[str]

    @property
    def targets(self) -> list[str]:
        """Names of the data sets that models were judged on."""
        return sorted({name for model in self.models for name in model.targets})


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class on one target: every model's IoU."""

    class_id: int
    name: str
    share: Number
    """Share of the truth's pixels."""
    values: tuple[Number, ...]
    difference: Number


def compared_models(story: Story) -> list[Judged]:
    """Models whose predictions are shown: the source's and the last round's."""
    last = max((one.round for one in story.models), default=0)
    return [one for one in story.models if one.kind == "source" or one.round == last]


def comparisons(story: Story) -> dict[str, Judged | None]:
    """What each judged model is compared with: the control of its round, else the source."""
    controls = {one.round: one for one in story.models if one.kind == "control"}
    against: dict[str, Judged | None] = {}
    for one in story.models:
        if one.kind == "source":
            against[one.instance] = None
        else:
            control = controls.get(one.round) if one.kind != "control" else None
            against[one.instance] = control or source_of(one, story.models)
    return against


def render(
    story: Story, painted: Sequence[Painted], predicted: Sequence[Predicted], *, title: str
) -> str:
    """The whole page as HTML, styles, script and pictures inside."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "signed": signed,
        "duration": duration,
        "moment": moment,
        "tone": tone,
        "json": as_json,
    }
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        title=title,
        story=story,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=digest,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        **_frame(story, painted, predicted),
        **_result(story),
        **_pipeline(story),
        **_pictures(story, painted),
        **_predictions(story, predicted),
        **_curves(story),
    )


def _frame(
    story: Story, painted: Sequence[Painted], predicted: Sequence[Predicted]
) -> dict[str, Any]:
    chapters = [
        ("result", "Result", True),
        ("pipeline", "Pipeline", True),
        ("pictures", "Pictures", painted),
        ("changes", "Refinement", story.changes),
        ("truth", "Label quality", story.quality),
        ("predictions", "Predictions", predicted),
        ("curves", "Curves", story.charts),
        ("classes", "Classes", story.models),
        ("provenance", "Provenance", True),
    ]
    colours = {
        entry.id: "#{:02x}{:02x}{:02x}".format(*entry.colour) for entry in story.space.classes
    }
    manifests = [one.manifest for one in story.instances.values()]
    return {
        "chapters": [(anchor, name) for anchor, name, there in chapters if there],
        "recipe": next((one["recipe"] for one in manifests if one.get("recipe")), None),
        "seed": next((one["seed"] for one in manifests if one.get("seed") is not None), None),
        "colour_of": colours,
        "palette": {colour: class_name(story.space, id_) for id_, colour in colours.items()},
        "name_of": lambda class_id: class_name(story.space, class_id),
        "plain": plain,
        "minus": minus,
        "record_of": _record,
    }


def _result(story: Story) -> dict[str, Any]:
    counts = {
        name: model.targets[name].num_images
        for model in reversed(story.models)
        for name in model.targets
    }
    number = len(story.targets)
    return {
        "verdict": story.verdict,
        "comparisons": comparisons(story),
        "compared": compared_models(story),
        "image_counts": counts,
        "targets_in_words": story.targets[0] if number == 1 else f"{number} targets",
        "what_it_is": _what_it_is,
        "unseen": not any(
            score.num_also_in_sources for model in story.models for score in model.targets.values()
        ),
        "by_round": _by_round(story),
        "class_rows": {name: _class_rows(story, name) for name in story.targets},
    }


def _by_round(story: Story) -> LineChart | None:
    """Mean mIoU in percent over the rounds, one line per leg; None before there are two rounds."""
    if max((one.round for one in story.models), default=0) < 2:
        return None
    start = [one for one in story.models if one.kind == "source" and one.mean is not None]
    lines: dict[str, list[tuple[float, float]]] = {}
    colours: dict[str, int] = {}
    for one in sorted(story.models, key=lambda one: one.round):
        if one.kind != "source" and one.mean is not None:
            leg = one.leg or "self-training"
            line = lines.setdefault(leg, [(0.0, 100 * start[0].mean)] if start else [])
            line.append((one.round, 100 * one.mean))
            colours[leg] = story.colours[one.instance]
    return line_chart("mIoU by round", lines, colours) if lines else None


def _what_it_is(model: Judged) -> str:
    return {
        "source": "trained on the labelled source",
        "control": "as many more steps on the source alone",
        "trained": f"trained on the source and on pictures with {model.labels or 'their'} labels",
    }[model.kind]


def _class_rows(story: Story, target: str) -> list[ClassRow]:
    compared = compared_models(story)
    scores = [model.targets.get(target) for model in compared]
    known = [score for score in scores if score]

    def at(values: Sequence[Number], class_id: int) -> Number:
        return values[class_id] if class_id < len(values) else None

    def iou(model: Judged | None, class_id: int) -> Number:
        return (
            at(model.targets[target].iou, class_id) if model and target in model.targets else None
        )

    verdict = story.verdict
    return [
        ClassRow(
            class_id=class_id,
            name=class_name(story.space, class_id),
            share=next((at(score.truth_share, class_id) for score in known), None),
            values=tuple(iou(model, class_id) for model in compared),
            difference=minus(iou(verdict.model, class_id), iou(verdict.reference, class_id))
            if verdict
            else None,
        )
        for class_id in range(max((len(score.iou) for score in known), default=0))
    ]


def _pipeline(story: Story) -> dict[str, Any]:
    everything = list(story.instances.values())
    used = {state_of(one, everything) for one in everything}
    return {
        "drawing": draw(story.instances) if everything else None,
        "box": (BOX_WIDTH, BOX_HEIGHT),
        "total_seconds": sum(one.seconds or 0 for one in everything),
        "state_words": _STATE_WORDS,
        "state_legend": _STATE_LEGEND,
        "shown_states": [state for state in _STATE_LEGEND if state in used],
        "now_states": ("ran", "cached", "shared"),
    }


def _pictures(story: Story, painted: Sequence[Painted]) -> dict[str, Any]:
    classes = Counter(class_id for one in painted for class_id in one.class_ids)
    refined = any(one.refined for one in painted)
    mode = story.chain.pictures.section("synthesize").get("mode") if story.chain.pictures else None
    return {
        "painted": painted,
        "painted_mode": mode != "collect",
        "noise": any(one.untrained for one in painted),
        "featured": max(painted, key=lambda one: one.changed_share or 0, default=None),
        "gallery_classes": sorted(classes.items(), key=lambda pair: (-pair[1], pair[0])),
        "dropped": sum(one.kept is False for one in painted),
        "left_name": "teacher’s labels",
        "right_name": "refined labels" if refined else "picture",
        "longest": max(
            (
                max(one.gained, one.moved + one.dropped)
                for one in (story.changes.classes if story.changes else ())
            ),
            default=0,
        )
        or 1,
    }


def _predictions(story: Story, predicted: Sequence[Predicted]) -> dict[str, Any]:
    shown = [
        model
        for model in compared_models(story)
        if any(view.instance == model.instance for one in predicted for view in one.views)
    ]
    first = story.verdict.model if story.verdict and story.verdict.model in shown else None
    first = first or (shown[-1] if shown else None)
    pixels = Counter(class_id for one in predicted for class_id in one.class_ids)
    return {
        "predicted": predicted,
        "shown_models": shown,
        "first_model": first.instance if first else None,
        "predicted_targets": sorted(Counter(one.dataset for one in predicted).items()),
        "predicted_classes": sorted(pixels),
    }


def _curves(story: Story) -> dict[str, Any]:
    def inner(chart: LineChart) -> bool:
        return chart.name.rpartition("_")[2].isdigit()

    trainings = {curve.label for chart in story.charts for curve in chart.curves}
    named = [one for name, one in story.instances.items() if name in trainings]
    return {
        "charts": [chart for chart in story.charts if not inner(chart)],
        "more_charts": [chart for chart in story.charts if inner(chart)],
        "trainings": [(one, _is_first_shown(one, story)) for one in named],
    }


def _is_first_shown(one: Instance, story: Story) -> bool:
    """Whether a training's curves are shown at first: the source's and the last round's."""
    last = max((other.round or 0 for other in story.instances.values()), default=0)
    return (one.round or 0) in (0, last)


def _record(one: Instance) -> list[tuple[str, str]]:
    """What a manifest tells of how and where its artifact was made."""
    made = one.manifest
    shown = {
        "started": moment(made.get("started")),
        "finished": moment(made.get("finished")),
        "took": duration(one.seconds),
        "made as": made.get("instance") if made.get("instance") != one.name else None,
        "origin": made.get("origin"),
        "seed": made.get("seed"),
        "precision": made.get("precision"),
        "device": made.get("device"),
        "host": made.get("host"),
        "machine": made.get("machine"),
        "peak memory": size_of(made.get("peak_memory_bytes")),
        "git revision": made.get("git_revision"),
        "Prefect run": made.get("prefect_run_id"),
        "digest": made.get("digest"),
        "folder": one.folder.name,
    }
    numbers = (made.get("summary") or {}).get("numbers") or {}
    shown |= {str(name): plain(value) for name, value in sorted(numbers.items())}
    return [(name, str(value)) for name, value in shown.items() if value not in (None, "–", "")]
