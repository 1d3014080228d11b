"""The words: bank, plan, and the judge of replies."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompts.loader import load_attributes, load_bank, load_words
from prompts.plan import CLASSES_PER_PROMPT, RAREST, class_weights, make_plan
from prompts.replies import NEAR, Distinct, find_problem, named_classes, names, stems, tidy
from stages.labels import load_labelspace

CITYSCAPES = {
    entry.name: (entry.name, *entry.synonyms) for entry in load_labelspace("cityscapes19").classes
}
GOOD = "A wet city street at dusk with a cyclist beside a long fence and two parked cars."


def problem_of(text: str, *, finished: bool = True, asked=None, count_tokens=len) -> str | None:
    found = find_problem(
        text,
        finished=finished,
        asked=asked or {},
        words=load_words(),
        count_tokens=lambda text: count_tokens(text.split()),
    )
    return found.kind if found else None


def test_the_bank_holds_at_least_300_prompts_that_pass_our_own_checks():
    bank = load_bank()
    assert len(bank) >= 300
    assert {text: kind for p in bank if (kind := problem_of(text := p.text))} == {}


def test_the_bank_holds_no_near_duplicates():
    distinct = Distinct()
    for prompt in load_bank():
        assert distinct.problem(prompt.text) is None, prompt.text
        distinct.add(prompt.text)


def test_the_bank_names_every_cityscapes_class_often():
    named = Counter(name for p in load_bank() for name in named_classes(p.text, CITYSCAPES))
    assert {name: named[name] for name in CITYSCAPES if named[name] < 15} == {}


def test_the_bank_uses_only_known_attribute_values():
    values = load_attributes().values
    for prompt in load_bank():
        assert set(prompt.attributes) == {"time", "weather", "season"}
        for name, value in prompt.attributes.items():
            assert value in values[name]


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("two buses and a lorry", "bus", True),
        ("several lorries wait", "lorry", True),
        ("old bushes", "bush", True),
        ("children play", "child", True),
        ("people walk", "person", True),
        ("brick houses", "house", True),
        ("a glass tower on the grass", "grass", True),
        ("Traffic lights ahead", "traffic light", True),
        ("a light in traffic", "traffic light", False),
        ("wallpaper", "wall", False),
        ("a polehouse", "pole", False),
        ("the carpet", "car", False),
        ("a BUS", "bus", True),
    ],
)
def test_a_phrase_is_found_as_whole_words_in_singular_or_plural(text, phrase, expected):
    assert names(text, [phrase]) is expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("  A road. \n", "A road."),
        ('"A road."', "A road."),
        ("“A road.”", "A road."),
        ('A "road".', 'A "road".'),
        ('"', '"'),
    ],
)
def test_quotation_marks_are_removed_only_around_the_whole_reply(reply, expected):
    assert tidy(reply) == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (GOOD, None),
        ("", "empty"),
        ("A street.\nAnother street with a lot of cars and people in it today.", "several lines"),
        ("1. A street with a lot of cars and many people on the sidewalk", "several lines"),
        ("- A street with a lot of cars and many people on the sidewalk", "several lines"),
        ("A street with \ufffd\ufffd and a lot of cars and people today", "strange characters"),
        ("**A street** with cars and people and one red bus today", "strange characters"),
        ("<think>A street with cars and people</think> A road today ok", "strange characters"),
        ("A street with cars.", "too short"),
        ("A street " + "with cars and " * 40, "too long"),
        ("I'm sorry, but I cannot describe a street with people in it today.", "refusal"),
        ("I’m sorry, but I can’t describe a street with people in it today.", "refusal"),
        ("I’m unable to describe a street with cars and people in it.", "refusal"),
        ("Unfortunately, describing a street with people goes against my guidelines.", "refusal"),
        ("Describing a street with people in it goes against my guidelines.", "refusal"),
        ("Here’s a sentence about a street with cars and people walking by.", "chatter"),
        ("As an AI, describing a street with cars is not what I should do.", "refusal"),
        ("Here is a sentence about a street with cars and people walking by.", "chatter"),
        ("Sure, a street with cars and people and a bus at the stop.", "chatter"),
        ("Prompt: a street with cars and people and a bus at the stop.", "chatter"),
        ("There are cars and people on a street under high pressure, and a bus.", None),
        ("A kitchen with a table, four chairs, a sink and a red kettle.", "no scene"),
    ],
)
def test_every_kind_of_bad_reply_is_refused_for_its_reason(text, kind):
    assert problem_of(text) == kind


def test_a_reply_that_was_cut_off_is_refused():
    assert problem_of(GOOD, finished=False) == "cut off"


def test_a_reply_must_name_every_class_asked_for():
    asked = {"rider": ("rider", "cyclist"), "pole": ("pole",)}
    assert problem_of(GOOD, asked=asked) == "class not named"
    assert problem_of(GOOD.replace("fence", "lamp pole"), asked=asked) is None


def test_a_reply_of_more_tokens_than_the_text_encoder_takes_is_refused():
    assert problem_of(GOOD, count_tokens=lambda words: 78) == "too many tokens"
    assert problem_of(GOOD, count_tokens=lambda words: 77) is None


def test_distinct_refuses_exact_and_near_copies_and_takes_others():
    distinct = Distinct()
    distinct.add(GOOD)
    assert distinct.problem(GOOD.upper() + "!").kind == "duplicate"
    assert distinct.problem(GOOD.replace("dusk", "night")).kind == "near duplicate"
    assert distinct.problem("A foggy motorway with trucks and a sign over the lanes.") is None


def _near(one: str, other: str) -> bool:
    """The definition, written out."""
    first, second = (set(itertools.pairwise(stems(text))) for text in (one, other))
    union = first | second
    return bool(union) and len(first & second) / len(union) >= NEAR


WORDS = st.lists(st.sampled_from(["road", "car", "bus", "tree", "wall"]), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6), WORDS)
def test_distinct_agrees_with_the_definition_written_out(before, candidate):
    texts, text = [" ".join(words) for words in before], " ".join(candidate)
    distinct = Distinct()
    for each in texts:
        distinct.add(each)
    expected = text in texts or any(_near(text, each) for each in texts)
    assert (distinct.problem(text) is not None) is expected


def test_a_plan_is_balanced_over_every_attribute_and_class():
    weights = class_weights(list(CITYSCAPES), None)
    plan = make_plan(load_attributes(), weights, count=250, seed=3)
    for name, values in load_attributes().values.items():
        counts = Counter(ask.attributes[name] for ask in plan)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1, name
    asked = Counter(name for ask in plan for name in ask.classes)
    assert set(asked) == set(CITYSCAPES)
    assert max(asked.values()) - min(asked.values()) <= 2


def test_a_plan_asks_for_distinct_classes_and_no_scene_that_does_not_go_together():
    plan = make_plan(load_attributes(), class_weights(list(CITYSCAPES), None), count=120, seed=1)
    assert all(len(set(ask.classes)) == CLASSES_PER_PROMPT for ask in plan)
    assert not any(load_attributes().clash(ask.attributes) for ask in plan)
    assert not any(
        ask.attributes["weather"] == "snow" and ask.attributes["season"] == "summer" for ask in plan
    )


def test_a_plan_depends_on_its_seed_alone():
    weights = class_weights(["road", "car"], None)
    plans = [make_plan(load_attributes(), weights, count=20, seed=seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_a_plan_over_fewer_classes_than_it_asks_for_at_once_asks_for_all():
    weights = class_weights(["road", "car"], None)
    plan = make_plan(load_attributes(), weights, count=5, seed=0)
    assert {ask.classes for ask in plan} == {("road", "car")}


def test_rare_classes_are_asked_for_up_to_three_times_as_often():
    pixels = {"road": 9000, "sky": 900, "car": 900, "pole": 100, "rider": 0}
    weights = class_weights(list(pixels), pixels)
    assert weights == {"road": 1.0, "sky": 1.0, "car": 1.0, "pole": 3.0, "rider": RAREST}
    names_of = [*pixels, "bus", "train", "wall", "fence"]
    weights = class_weights(names_of, pixels | {"bus": 900, "train": 900, "wall": 900})
    plan = make_plan(load_attributes(), weights, count=300, seed=0)
    asked = Counter(name for ask in plan for name in ask.classes)
    assert 2.5 <= asked["rider"] / asked["road"] <= 3.5


def test_a_conversation_ends_with_the_request_and_takes_turns():
    scene, classes = {"place": "old town", "time": "dusk"}, ["rider", "pole"]
    turns = load_words().conversation(scene, classes)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]
    assert "place: old town; time: dusk" in turns[-1]["content"]
    assert "rider, pole" in turns[-1]["content"]
    again = load_words().conversation(scene, classes, refused=("Nonsense.", "it was nonsense"))
    assert again[-2] == {"role": "assistant", "content": "Nonsense."}
    assert "it was nonsense" in again[-1]["content"]


def test_the_examples_keep_the_rules_they_illustrate():
    for example in load_words().examples:
        asked = {name: CITYSCAPES[name] for name in example["classes"].split(", ")}
        assert problem_of(example["reply"], asked=asked) is None
