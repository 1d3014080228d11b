"""Train the miniature's writer: from the requests of `write_prompts` to sentences put together.

python flows/miniature.py --stage pretrain_writer

The requests are the real ones: planned by `prompts/plan.py`, worded by `prompts/writer.yaml`. Only
sentences that pass the checks of `prompts/replies.py` are lessons.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.miniature.writer_lessons import compose
from models.miniature.writer_network import build_writer, save_writer, train_tokenizer
from models.writer import count_clip_tokens, load_writer
from prompts.loader import load_attributes, load_words
from prompts.plan import Ask, class_weights, make_plan
from prompts.replies import find_problem
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.labels import load_labelspace
from stages.pretrain_config import PretrainWriterConfig
from stages.pretraining import pretrain
from stages.shards import item_seed

LABEL_SPACES = ("miniature", "cityscapes19")
"""Whose classes are asked for, in turns."""
TOKENIZER_LESSONS = 6000
"""Lessons from which the tokenizer learns its words."""
IGNORED = -100
"""Target of the tokens that no loss is taken of (transformers' convention)."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A request and the reply to learn."""

    turns: tuple[dict[str, str], ...]
    """The conversation, as `write_prompts` has it."""
    reply: str


def run(config: StageConfig, *, out: Path, progress: Progress) -> Summary:
    """Train, and leave a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Args:
        config: section `pretrain_writer`.
        out: the artifact; an interrupted attempt goes on from its `state/`.
        progress: told every step.

    Raises:
        TrainingError: the training diverged.
    """
    section, seed = config.pretrain_writer, config.seed
    torch.manual_seed(seed)
    if section.start is None:
        tokenizer = make_tokenizer(seed)
        network = build_writer(tokenizer)
    else:
        earlier = load_writer(section.start)
        tokenizer, network = earlier.tokenizer, earlier.model
    network.train()
    losses = partial(
        _losses, network, tokenizer, section, seed=seed, bf16=config.precision == "bf16"
    )
    found = pretrain(network, losses, section, seed=seed, out=out, progress=progress)
    save_writer(network, tokenizer, out)
    lessons = int(found["steps"]) * section.batch_size
    return Summary(
        text=f"{found['steps']:.0f} steps, {lessons} sentences, "
        f"loss {found['total']:.3f} per token",
        numbers={"sentences": lessons, **found},
    )


def make_tokenizer(seed: int, *, num_lessons: int = TOKENIZER_LESSONS) -> PreTrainedTokenizerFast:
    """The writer's tokenizer; a function of the seed, the instruction and the phrases."""
    lessons = [
        lesson
        for part in range(num_lessons // 200)
        for lesson in lessons_of(LABEL_SPACES[part % 2], count=200, seed=item_seed(seed, part))
    ]
    fixed = fixed_parts()
    asked = re.compile("|".join(map(re.escape, fixed)))
    wanted = [asked.sub("\n", lesson.turns[-1]["content"]) for lesson in lessons]
    return train_tokenizer([*(lesson.reply for lesson in lessons), *wanted], fixed=fixed)


def fixed_parts() -> list[str]:
    """What every request says word for word: the instruction around its fields, and the attributes'
    names."""
    around = re.split(r"\{\w+\}", load_words().instruction)
    first, *others = load_attributes().values
    names = [f"{first}:", *(f"; {name}:" for name in others)]
    return [part.strip(" ") for part in [*around, *names]]


def lessons_of(labels: str, *, count: int, seed: int) -> list[Lesson]:
    """As many lessons, one per request of a plan; a function of the arguments alone."""
    words = {entry.name: (entry.name, *entry.synonyms) for entry in _space(labels).classes}
    plan = make_plan(load_attributes(), class_weights(list(words), None), count=count, seed=seed)
    rng = random.Random(seed)
    return [_lesson(ask, words, rng) for ask in plan]


def _lesson(ask: Ask, words: dict[str, tuple[str, ...]], rng: random.Random) -> Lesson:
    asked = {name: words[name] for name in ask.classes}
    while True:
        reply = compose(ask.attributes, ask.classes, rng)
        problem = find_problem(
            reply, finished=True, asked=asked, words=load_words(), count_tokens=count_clip_tokens
        )
        if problem is None:
            turns = load_words().conversation(ask.attributes, ask.classes)
            return Lesson(turns=tuple(turns), reply=reply)


@cache
def _space(labels: str):
    return load_labelspace(labels)


def encode(
    tokenizer: PreTrainedTokenizerFast, lessons: Sequence[Lesson]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, T] and targets [B, T], which are `IGNORED` for requests and padding."""
    rows, starts = [], []
    for lesson in lessons:
        request = tokenizer.apply_chat_template(list(lesson.turns), tokenize=False)
        asked = tokenizer(request, add_special_tokens=False).input_ids
        told = tokenizer(lesson.reply + tokenizer.eos_token, add_special_tokens=False).input_ids
        rows.append(asked + told)
        starts.append(len(asked))
    longest = max(map(len, rows))
    tokens_BT = torch.full((len(rows), longest), tokenizer.pad_token_id)
    targets_BT = torch.full((len(rows), longest), IGNORED)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens_BT[place, : len(row)] = torch.tensor(row)
        targets_BT[place, start : len(row)] = tokens_BT[place, start : len(row)]
    return tokens_BT, targets_BT


def _losses(
    network: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainWriterConfig,
    step: int,
    *,
    seed: int,
    bf16: bool,
) -> dict[str, torch.Tensor]:
    """Mean negative log-likelihood of a reply's token, in nats."""
    lessons = lessons_of(
        LABEL_SPACES[step % 2], count=config.batch_size, seed=item_seed(seed, "writer", step)
    )
    tokens_BT, targets_BT = encode(tokenizer, lessons)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        found = network(
            input_ids=tokens_BT,
            attention_mask=tokens_BT != tokenizer.pad_token_id,
            labels=targets_BT,
        )
    return {"total": found.loss}
