"""Measure the miniature's writer before it ships: a plan that no training saw, every reply judged.

    python flows/miniature.py --stage measure_writer

It is loaded and asked as `write_prompts` loads and asks any model; only first replies count.
"""

import json
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

from models.miniature.writer_lessons import ATTRIBUTES, says
from models.writer import Writer, count_clip_tokens, load_writer
from prompts.loader import load_attributes, load_words
from prompts.plan import Ask, class_weights, make_plan
from prompts.replies import Distinct, find_problem, tidy
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.labels import load_labelspace
from stages.pretrain_config import MeasureWriterConfig
from stages.shards import item_seed, write_json

GATED = "miniature"
"""The label space whose share is the gate; others are told beside it."""
LABEL_SPACES = (GATED, "cityscapes19")
NUM_SAMPLES = 12
"""Replies kept to be read."""


def run(config: StageConfig, *, out: Path, progress: Progress, writer: Path) -> Summary:
    """Measure, and leave `gates.json`: figures, and whether the gate is passed.

    Args:
        config: section `measure_writer`.
        out: where `gates.json` goes.
        progress: told each reply.
        writer: folder of the writer.
    """
    section = config.measure_writer
    loaded = load_writer(str(writer))
    progress.start(section.num_prompts * len(LABEL_SPACES), "replies")
    table = {
        labels: examine(loaded, section, labels=labels, seed=config.seed, progress=progress)
        for labels in LABEL_SPACES
    }
    passed = table[GATED]["accepted"] >= section.min_share
    how = {"temperature": section.temperature, "top_p": section.top_p}
    found = {"label_spaces": table, **how, "min_share": section.min_share, "passed": passed}
    write_json(out / "gates.json", {"writer": found})
    shares = ", ".join(f"{labels} {row['accepted']:.1%}" for labels, row in table.items())
    return Summary(
        text=f"valid and distinct: {shares}; {'passed' if passed else 'NOT passed'}",
        numbers={"writer": json.dumps(found)},
    )


def examine(
    writer: Writer, config: MeasureWriterConfig, *, labels: str, seed: int, progress: Progress
) -> dict[str, Any]:
    """Shares of first replies to a plan that are accepted, and why others are not.

    `accepted`: valid by every check and neither an exact nor a near copy of one accepted before.
    `follows`, by attribute: share of replies with a phrase of the value asked for; `strays`: with a
    phrase of another value and none of that one.
    """
    words = {entry.name: (entry.name, *entry.synonyms) for entry in load_labelspace(labels).classes}
    plan = make_plan(
        load_attributes(),
        class_weights(list(words), None),
        count=config.num_prompts,
        seed=item_seed(seed, "judge writer", labels),
    )
    distinct, refused, accepted = Distinct(), Counter(), []
    follows, strays, num_words = Counter(), Counter(), 0
    started_s = perf_counter()
    for ask, text, finished in _answers(writer, plan, config, seed, progress):
        problem = find_problem(
            text,
            finished=finished,
            asked={name: words[name] for name in ask.classes},
            words=load_words(),
            count_tokens=count_clip_tokens,
        ) or distinct.problem(text)
        if problem is None:
            distinct.add(text)
            accepted.append(text)
        else:
            refused[problem.kind] += 1
        num_words += len(text.split())
        for name in ATTRIBUTES:
            said = says(text, name)
            follows[name] += ask.attributes[name] in said
            strays[name] += bool(said) and ask.attributes[name] not in said
    return {
        "replies": len(plan),
        "accepted": len(accepted) / len(plan),
        "refused": dict(sorted(refused.items())),
        "follows": {name: follows[name] / len(plan) for name in ATTRIBUTES},
        "strays": {name: strays[name] / len(plan) for name in ATTRIBUTES},
        "mean_words": round(num_words / len(plan), 1),
        "replies_per_s": round(len(plan) / (perf_counter() - started_s), 1),
        "samples": accepted[:NUM_SAMPLES],
    }


def _answers(
    writer: Writer, plan: list[Ask], config: MeasureWriterConfig, seed: int, progress: Progress
):
    """Yields (ask, first reply, whether it ended by itself)."""
    for start in range(0, len(plan), config.batch_size):
        batch = plan[start : start + config.batch_size]
        replies = writer.write(
            [load_words().conversation(ask.attributes, ask.classes) for ask in batch],
            seeds=[item_seed(seed, "judge writer", ask.number) for ask in batch],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        for ask, reply in zip(batch, replies, strict=True):
            yield ask, tidy(reply.text), reply.finished
        progress.advance(len(batch))
