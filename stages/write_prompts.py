"""Have a language model write scene descriptions, by a plan, and keep the good and distinct ones.

    clouds --stage write_prompts --set write_prompts.num_prompts=24

The plan (`prompts/plan.py`) says which scene and which classes each description is asked for. A
reply that cannot be used is asked for again, a bounded number of times; then the shipped bank fills
the gap. Replies are kept under `state/` until the end, so that a restart asks for nothing twice.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from models.hub import model_label
from models.served_writer import ServedWriter, connect
from models.writer import Reply, Writer, count_clip_tokens, load_writer
from prompts.loader import BankPrompt, load_attributes, load_bank, load_words
from prompts.plan import Ask, class_weights, make_plan
from prompts.replies import Distinct, Problem, find_problem, named_classes, tidy
from stages.config import StageConfig, WritePromptsConfig
from stages.contracts import Progress, Summary
from stages.devices import choose_device
from stages.labels import LabelSpace, read_labelspace
from stages.shards import Row, item_seed, read_jsonl, write_json, write_jsonl

BANK = "bank"
"""The value of `write_prompts.model` that stands for the shipped prompts."""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A description that is kept."""

    text: str
    seed: int | None
    """Seed of the reply; None: from the bank."""
    attributes: Mapping[str, str]
    classes: Sequence[str]


@dataclass
class Tally:
    """What became of the replies."""

    replies: int = 0
    valid: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    labelspace: Path,
    sources: Path | None = None,
    labelled: Path | None = None,
) -> Summary:
    """Write `prompts.jsonl` and `statistics.json`.

    Args:
        config: reads `write_prompts`.
        out: the stage's folder.
        progress: told each accepted prompt.
        labelspace: part of `prepare` with the classes to ask for.
        sources: part of `prepare` whose class statistics say which classes are rare; None: all
            classes are asked for equally often.
        labelled: artifact of the round before's `pseudo_label`, where the plan takes aim.

    Raises:
        ConnectionError: the server does not answer; what it wrote so far is kept for a restart.
        FileNotFoundError: the model is not to be had.
        ValueError: it has no chat template, too few replies are valid, or the bank is too small.
    """
    # 1. Plan what to ask for, and load who is asked.
    section = config.write_prompts
    space = read_labelspace(labelspace)
    weights = _class_weights(section, space, sources=sources, labelled=labelled)
    seed = item_seed(config.seed, "write_prompts", config.round or 0)
    plan = make_plan(load_attributes(), weights, count=section.num_prompts, seed=seed)
    _check_bank(section)
    writer = _load(config)
    progress.start(len(plan), "prompts")

    # 2. Ask until every reply is valid, or too often.
    distinct, tally = Distinct(), Tally()
    accepted: dict[int, Accepted] = {}
    if writer is not None:
        asking = _Asking(
            section=section,
            writer=writer,
            words_of=_words_of(space),
            seed=seed,
            state=out / "state",
            distinct=distinct,
            tally=tally,
        )
        for number, found in asking.ask(plan):
            accepted[number] = found
            progress.advance()
        _check_share(section, tally)
    num_written = len(accepted)

    # 3. Fill what is left from the shipped bank.
    for number, found in _from_bank(plan, accepted, space=space, distinct=distinct):
        accepted[number] = found
        progress.advance()

    # 4. Write everything down.
    label = model_label(section.model)
    rows = [
        _row(number, accepted[number], model=label, untrained=bool(writer and writer.untrained))
        for number in range(len(plan))
    ]
    write_jsonl(out / "prompts.jsonl", rows)
    statistics = _statistics(rows, plan=plan, tally=tally, weights=weights, space=space)
    write_json(out / "statistics.json", statistics)
    shutil.rmtree(out / "state", ignore_errors=True)
    return _summary(rows, tally, num_written)


def _class_weights(
    section: WritePromptsConfig, space: LabelSpace, *, sources: Path | None, labelled: Path | None
) -> dict[str, float]:
    """How much more often each class is asked for: what is rare in the sources, and by
    `write_prompts.aim` what was rare or uncertain in the pictures of the round before."""
    weights = class_weights(space.names, _source_pixels(sources, space))
    if labelled is None:
        return weights
    aimed = class_weights(space.names, _sure_pixels(labelled, space))
    share = section.aim
    return {name: (1 - share) * weights[name] + share * aimed[name] for name in space.names}


def _sure_pixels(labelled: Path, space: LabelSpace) -> dict[str, int]:
    """Pixels of each class in the round before, each counted by its confidence."""
    statistics = json.loads((labelled / "statistics.json").read_text(encoding="utf-8"))
    return {
        space.names[int(train_id)]: round(entry["pixels"] * entry["mean_confidence"])
        for train_id, entry in statistics["classes"].items()
    }


def _source_pixels(sources: Path | None, space: LabelSpace) -> dict[str, int] | None:
    """Labelled pixels of each class over all source data sets."""
    if sources is None:
        return None
    pixels: Counter[str] = Counter()
    for path in sorted(sources.glob("*.jsonl")):
        for row in read_jsonl(path):
            for train_id, count in (row.get("classes") or {}).items():
                pixels[space.names[int(train_id)]] += count
    return dict(pixels)


def _words_of(space: LabelSpace) -> dict[str, tuple[str, ...]]:
    return {entry.name: (entry.name, *entry.synonyms) for entry in space.classes}


def _check_bank(section: WritePromptsConfig) -> None:
    size = len(load_bank())
    if section.model == BANK and section.num_prompts > size:
        raise ValueError(
            f"write_prompts.num_prompts is {section.num_prompts}, but the shipped bank holds {size}"
            f" prompts: ask for at most {size}, or name a language model (write_prompts.model)."
        )


def _load(config: StageConfig) -> Writer | ServedWriter | None:
    section = config.write_prompts
    if section.model == BANK:
        return None
    if section.server is not None:
        return connect(section.server, model=section.model)
    device = choose_device(config)
    return load_writer(
        section.model,
        revision=section.revision,
        device=device.device,
        device_map=section.device_map,
        dtype=device.dtype,
        seed=config.seed,
    )


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """Asks a writer for every description of a plan until it is valid, or too often."""

    section: WritePromptsConfig
    writer: Writer | ServedWriter
    words_of: Mapping[str, Sequence[str]]
    seed: int
    state: Path
    distinct: Distinct
    tally: Tally

    def ask(self, plan: Sequence[Ask]) -> Iterator[tuple[int, Accepted]]:
        """Yields the number of an ask and what was accepted for it."""
        self.state.mkdir(parents=True, exist_ok=True)
        refused: dict[int, tuple[str, str]] = {}
        pending = list(plan)
        for attempt in range(1 + self.section.max_attempts):
            again = []
            for ask, reply in self._replies(pending, refused, attempt):
                text, problem = self._judge(ask, reply)
                if problem is None:
                    yield ask.number, self._accept(ask, text, attempt)
                else:
                    refused[ask.number] = (text, problem.detail)
                    again.append(ask)
            pending = again

    def _replies(
        self, pending: Sequence[Ask], refused: Mapping[int, tuple[str, str]], attempt: int
    ) -> Iterator[tuple[Ask, Reply]]:
        size = self.section.batch_size
        for start in range(0, len(pending), size):
            batch = pending[start : start + size]
            path = self.state / f"replies-{attempt:02d}-{start // size:05d}.json"
            if not path.is_file():
                write_json(path, [asdict(reply) for reply in self._write(batch, refused, attempt)])
            replies = [Reply(**raw) for raw in json.loads(path.read_text(encoding="utf-8"))]
            yield from zip(batch, replies, strict=True)

    def _write(
        self, batch: Sequence[Ask], refused: Mapping[int, tuple[str, str]], attempt: int
    ) -> list[Reply]:
        words = load_words()
        chats = [
            words.conversation(ask.attributes, ask.classes, refused=refused.get(ask.number, ()))
            for ask in batch
        ]
        return self.writer.write(
            chats,
            seeds=[self._reply_seed(ask, attempt) for ask in batch],
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            top_p=self.section.top_p,
        )

    def _reply_seed(self, ask: Ask, attempt: int) -> int:
        return item_seed(self.seed, ask.number, attempt)

    def _judge(self, ask: Ask, reply: Reply) -> tuple[str, Problem | None]:
        text = tidy(reply.text)
        problem = find_problem(
            text,
            finished=reply.finished,
            asked={name: self.words_of[name] for name in ask.classes},
            words=load_words(),
            count_tokens=count_clip_tokens,
        ) or self.distinct.problem(text)
        self.tally.replies += 1
        if problem is not None:
            self.tally.refused[problem.kind] += 1
        return text, problem

    def _accept(self, ask: Ask, text: str, attempt: int) -> Accepted:
        self.tally.valid += 1
        self.distinct.add(text)
        return Accepted(
            text=text,
            seed=self._reply_seed(ask, attempt),
            attributes=ask.attributes,
            classes=ask.classes,
        )


def _check_share(section: WritePromptsConfig, tally: Tally) -> None:
    share = tally.valid / max(tally.replies, 1)
    if share < section.min_valid_share:
        worst = ", ".join(f"{kind} {count}" for kind, count in tally.refused.most_common(3))
        raise ValueError(
            f"only {tally.valid} of {tally.replies} replies of {section.model!r} are valid "
            f"({share:.0%}; write_prompts.min_valid_share is {section.min_valid_share:.0%}). Most "
            f"common reasons: {worst}. Choose a larger instruction-tuned model, or a lower share."
        )


def _from_bank(
    plan: Sequence[Ask],
    accepted: Mapping[int, Accepted],
    *,
    space: LabelSpace,
    distinct: Distinct,
) -> Iterator[tuple[int, Accepted]]:
    """For every ask without a text the unused shipped prompt that fits it best."""
    bank, words_of = load_bank(), _words_of(space)
    unused = {place: named_classes(prompt.text, words_of) for place, prompt in enumerate(bank)}
    for ask in plan:
        if ask.number in accepted:
            continue
        fits = sorted(unused, key=lambda place: _misfit(ask, bank[place], unused[place], place))
        best = next((place for place in fits if distinct.problem(bank[place].text) is None), None)
        if best is None:
            raise ValueError(
                f"the shipped bank ({len(bank)} prompts) is used up before all {len(plan)} "
                "prompts of write_prompts.num_prompts are there: ask for fewer, or for more "
                "attempts of a better model (write_prompts.max_attempts, write_prompts.model)."
            )
        text, attributes = bank[best].text, bank[best].attributes
        distinct.add(text)
        named = unused.pop(best)
        yield ask.number, Accepted(text=text, seed=None, attributes=attributes, classes=named)


def _misfit(ask: Ask, prompt: BankPrompt, named: Sequence[str], place: int) -> tuple[int, int, int]:
    """Order of shipped prompts for an ask: most of its classes, then its scene, then bank order."""
    scene = sum(ask.attributes.get(name) == value for name, value in prompt.attributes.items())
    return -len(set(named) & set(ask.classes)), -scene, place


def _row(number: int, found: Accepted, *, model: str, untrained: bool) -> Row:
    from_bank = found.seed is None
    return {
        "id": f"p{number:05d}",
        "text": found.text,
        "attributes": dict(found.attributes),
        "classes": list(found.classes),
        "model": BANK if from_bank else model,
        "seed": found.seed,
        "untrained": untrained and not from_bank,
    }


def _statistics(
    rows: Sequence[Row],
    *,
    plan: Sequence[Ask],
    tally: Tally,
    weights: Mapping[str, float],
    space: LabelSpace,
) -> dict[str, object]:
    asked = Counter(name for ask in plan for name in ask.classes)
    named = Counter(name for row in rows for name in named_classes(row["text"], _words_of(space)))
    scenes: dict[str, Counter[str]] = {name: Counter() for name in load_attributes().values}
    for row in rows:
        for name, value in row["attributes"].items():
            scenes.setdefault(name, Counter())[value] += 1
    return {
        "num_prompts": len(rows),
        "from_bank": sum(row["model"] == BANK for row in rows),
        "from_random_writer": sum(row["untrained"] for row in rows),
        "replies": {
            "asked": tally.replies,
            "valid": tally.valid,
            "refused": dict(sorted(tally.refused.items())),
        },
        "attributes": {name: dict(counts) for name, counts in scenes.items()},
        "classes": {
            name: {"asked": asked[name], "named": named[name], "weight": round(weights[name], 4)}
            for name in space.names
        },
    }


def _summary(rows: Sequence[Row], tally: Tally, num_written: int) -> Summary:
    from_bank = len(rows) - num_written
    parts = [f"{len(rows)} prompts"]
    if tally.replies:
        parts.append(f"{tally.valid} of {tally.replies} replies valid")
    if from_bank:
        parts.append(f"{from_bank} from the shipped bank")
    numbers = {"prompts": len(rows), "replies": tally.replies, "from_bank": from_bank}
    return Summary(text=", ".join(parts), numbers=numbers)
