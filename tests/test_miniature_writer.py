"""The miniature's writer: sentences by rule, requests as tokens, training to the bit, its exam."""

import random

import pytest
import torch
from safetensors.torch import load_file

from models.miniature.writer_lessons import compose, known, says
from models.writer import Reply, Writer, count_clip_tokens, load_writer
from prompts.loader import load_attributes, load_words
from prompts.plan import class_weights, make_plan
from prompts.replies import Distinct, find_problem
from stages import measure_writer, pretrain_writer
from stages.config import StageConfig
from stages.labels import load_labelspace
from stages.pretrain_config import MeasureWriterConfig, PretrainRecipe
from stages.pretrain_writer import IGNORED, LABEL_SPACES, encode, fixed_parts, lessons_of
from tests.interruptions import Interrupted, Interrupting
from tests.tiny import Told


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain_writer.make_tokenizer(0, num_lessons=400)


def words_of(labels: str) -> dict[str, tuple[str, ...]]:
    return {entry.name: (entry.name, *entry.synonyms) for entry in load_labelspace(labels).classes}


def test_there_are_phrases_for_every_attribute_value_and_every_class():
    phrases = known()
    for name, values in load_attributes().values.items():
        assert set(phrases[name]) == set(values)
    for labels in LABEL_SPACES:
        assert set(words_of(labels)) <= set(phrases["classes"])


def test_what_has_no_phrases_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no phrases for 'zebra' under 'things'; it has road"):
        compose({"place": "suburb", "time": "dusk"}, ["zebra"], random.Random(0))


@pytest.mark.parametrize("labels", LABEL_SPACES)
def test_sentences_by_rule_are_valid_and_distinct(labels):
    words = words_of(labels)
    plan = make_plan(load_attributes(), class_weights(list(words), None), count=300, seed=4)
    distinct, rng, refused = Distinct(), random.Random(0), []
    for ask in plan:
        text = compose(ask.attributes, ask.classes, rng)
        problem = find_problem(
            text,
            finished=True,
            asked={name: words[name] for name in ask.classes},
            words=load_words(),
            count_tokens=count_clip_tokens,
        ) or distinct.problem(text)
        distinct.add(text)
        refused += [f"{problem.kind}: {text}"] if problem else []
        assert says(text, "place") | says(text, "road")
    assert len(refused) <= 3, refused


@pytest.mark.parametrize(
    ("text", "attribute", "values"),
    [
        ("A city street at night in falling snow.", "time", {"night"}),
        ("A city street in the rain.", "weather", {"light rain", "heavy rain"}),
        ("A calm residential street at dusk.", "place", {"residential street"}),
        ("A city streetcar.", "place", set()),
        ("A suburban street going uphill.", "road", {"steep street"}),
        ("A low view of a road in midwinter, a traffic jam.", "season", {"winter"}),
        ("A low view of a road in midwinter, a traffic jam.", "traffic", {"standing queue"}),
    ],
)
def test_values_of_attributes_are_found_in_sentences(text, attribute, values):
    assert says(text, attribute) == values


def test_the_fixed_parts_of_a_request_are_single_tokens(tokenizer):
    (lesson,) = lessons_of("miniature", count=1, seed=0)
    text = tokenizer.apply_chat_template(list(lesson.turns), tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert set(tokenizer.convert_tokens_to_ids(fixed_parts())) <= set(ids)
    assert len(ids) < 60
    assert tokenizer.decode(ids) == text


def test_the_template_shows_the_last_request_alone_also_after_a_refused_reply(tokenizer):
    scene, classes = {"place": "old town", "time": "dusk"}, ["rider", "pole"]
    words = load_words()
    turns = words.conversation(scene, classes)
    plain = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    again = words.conversation(scene, classes, refused=("Nonsense.", "it was nonsense"))
    shown = tokenizer.apply_chat_template(again, tokenize=False, add_generation_prompt=True)
    assert shown == plain == f"<start>{turns[-1]['content']}<reply>"


def test_only_replies_and_their_end_are_learned(tokenizer):
    lessons = lessons_of("miniature", count=3, seed=0)
    tokens_BT, targets_BT = encode(tokenizer, lessons)
    for lesson, tokens_T, targets_T in zip(lessons, tokens_BT, targets_BT, strict=True):
        learned_T = targets_T != IGNORED
        assert torch.equal(tokens_T[learned_T], targets_T[learned_T])
        assert tokenizer.decode(targets_T[learned_T]) == lesson.reply + "<end>"


def test_lessons_are_a_function_of_seed_and_ask_as_write_prompts_does():
    one, same, other = (lessons_of("miniature", count=4, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert one[0].turns[:-1] == tuple(load_words().conversation({}, []))[:-1]
    assert "Scene: place:" in one[0].turns[-1]["content"]


def test_interrupted_training_ends_with_the_same_bits_and_loads_as_any_model(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain_writer, "TOKENIZER_LESSONS", 200)
    section = {"steps": 3, "batch_size": 2, "checkpoint_every": 1, "log_every": 1}
    recipe = PretrainRecipe(pretrain_writer=section)
    config = StageConfig(recipe, stage="pretrain_writer", sections=("pretrain_writer",))
    pretrain_writer.run(config, out=tmp_path / "straight", progress=Told())
    with pytest.raises(Interrupted):
        pretrain_writer.run(config, out=tmp_path / "cut", progress=Interrupting(after=2))
    summary = pretrain_writer.run(config, out=tmp_path / "cut", progress=Told())
    straight, cut = (
        load_file(tmp_path / name / "model.safetensors") for name in ("straight", "cut")
    )
    assert all(torch.equal(straight[name], cut[name]) for name in straight)
    assert summary.numbers["sentences"] == 6
    writer = load_writer(str(tmp_path / "cut"))
    (reply,) = writer.write(
        [load_words().conversation({"place": "suburb"}, ["car"])],
        seeds=[0],
        max_new_tokens=4,
        temperature=0.9,
        top_p=0.95,
    )
    assert reply.text


def test_training_may_begin_with_an_earlier_writer_and_keeps_its_tokenizer(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain_writer, "TOKENIZER_LESSONS", 200)

    def trained(name, seed, **section):
        section = {"steps": 1, "batch_size": 1, "lr": 1e-6, **section}
        recipe = PretrainRecipe(pretrain_writer=section, seed=seed)
        config = StageConfig(recipe, stage="pretrain_writer", sections=("pretrain_writer",))
        pretrain_writer.run(config, out=tmp_path / name, progress=Told())
        return load_file(tmp_path / name / "model.safetensors")

    earlier = trained("earlier", seed=7)
    later = trained("later", seed=8, start=str(tmp_path / "earlier"))
    assert all(torch.allclose(later[name], earlier[name], atol=1e-3) for name in earlier)
    assert (tmp_path / "later" / "tokenizer.json").read_bytes() == (
        tmp_path / "earlier" / "tokenizer.json"
    ).read_bytes()


class ByRule(Writer):
    """Answers with sentences by rule, one of five spoilt; stands for a trained writer."""

    def write(self, conversations, *, seeds, **how):
        return [self._reply(turns, seed) for turns, seed in zip(conversations, seeds, strict=True)]

    def _reply(self, turns, seed):
        asked = turns[-1]["content"]
        scene = asked.split("Scene: ")[1].split(".\n")[0]
        classes = asked.split("named in the description: ")[1].split(".\n")[0]
        attributes = dict(part.split(": ") for part in scene.split("; "))
        text = compose(attributes, classes.split(", "), random.Random(seed))
        return Reply(text=f"Sure, {text}" if seed % 5 == 0 else text, finished=True)


def test_the_exam_counts_valid_distinct_replies_and_what_they_follow(tokenizer):
    told = Told()
    found = measure_writer.examine(
        ByRule(model=None, tokenizer=tokenizer),
        MeasureWriterConfig(num_prompts=100, batch_size=30),
        labels="miniature",
        seed=0,
        progress=told,
    )
    assert told.advanced == found["replies"] == 100
    spoilt = found["refused"]["chatter"]
    assert 10 <= spoilt <= 35
    assert found["accepted"] == pytest.approx(1 - sum(found["refused"].values()) / 100)
    assert found["follows"]["time"] > 0.85
    assert found["strays"]["time"] < 0.05
    assert found["samples"][0].endswith(".")


def test_an_untrained_writer_does_not_pass_its_exam(tmp_path):
    torch.set_num_threads(1)
    from models.writer import save_random_writer

    save_random_writer(tmp_path / "writer", seed=0)
    recipe = PretrainRecipe(measure_writer={"num_prompts": 2, "max_new_tokens": 4})
    config = StageConfig(recipe, stage="measure_writer", sections=("measure_writer",))
    out = tmp_path / "out"
    out.mkdir()
    summary = measure_writer.run(config, out=out, progress=Told(), writer=tmp_path / "writer")
    assert summary.text == "valid and distinct: miniature 0.0%, cityscapes19 0.0%; NOT passed"
    assert '"passed": false' in (out / "gates.json").read_text()
