"""The writer: a real (tiny, random) Llama through transformers."""

from collections import Counter
from time import perf_counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.writer import (
    GumbelNoise,
    count_clip_tokens,
    load_writer,
    save_random_writer,
)

CHATS = [
    [{"role": "user", "content": "Describe a street."}],
    [
        {"role": "user", "content": "Describe a long road with many trees."},
        {"role": "assistant", "content": "A road."},
        {"role": "user", "content": "Again."},
    ],
]
HOW = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95}


@pytest.fixture(scope="module")
def writer():
    torch.set_num_threads(1)
    return load_writer("random", seed=3)


def test_a_reply_depends_on_its_own_seed_and_not_on_its_batch_mates(writer):
    together = writer.write(CHATS, seeds=[1, 2], **HOW)
    assert writer.write(CHATS[1:], seeds=[2], **HOW) == together[1:]
    assert writer.write(CHATS, seeds=[9, 2], **HOW)[1] == together[1]
    assert writer.write(CHATS, seeds=[1, 8], **HOW)[1] != together[1]


def test_temperature_zero_is_the_most_probable_token_step_by_step(writer):
    (reply,) = writer.write(CHATS[:1], seeds=[0], max_new_tokens=6, temperature=0, top_p=1)
    text = writer.tokenizer.apply_chat_template(
        CHATS[0], tokenize=False, add_generation_prompt=True
    )
    tokens = writer.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    start = tokens.shape[1]
    with torch.inference_mode():
        for _ in range(6):
            best = writer.model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    assert reply.text == writer.tokenizer.decode(tokens[0, start:], skip_special_tokens=True)
    assert not reply.finished


def test_a_reply_that_ends_by_itself_is_finished_and_cut_at_its_end(writer):
    (longer,) = writer.write(CHATS[:1], seeds=[0], max_new_tokens=6, temperature=0, top_p=1)
    first = writer.tokenizer(longer.text, add_special_tokens=False).input_ids[0]
    usual = writer.model.generation_config.eos_token_id
    writer.model.generation_config.eos_token_id = [first]
    try:
        (reply,) = writer.write(CHATS[:1], seeds=[0], max_new_tokens=6, temperature=0, top_p=1)
    finally:
        writer.model.generation_config.eos_token_id = usual
    assert reply.finished
    assert reply.text == ""


def test_gumbel_noise_draws_tokens_with_their_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    num_draws = 4000
    noise = GumbelNoise(range(num_draws))
    scores = probabilities.log().expand(num_draws, -1)
    drawn = Counter(noise(torch.zeros(num_draws, 1), scores).argmax(1).tolist())
    for token, probability in enumerate(probabilities.tolist()):
        spread = (probability * (1 - probability) / num_draws) ** 0.5
        assert abs(drawn[token] / num_draws - probability) < 4 * spread


def test_random_writers_of_one_seed_are_the_same_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_random_writer(tmp_path / name, seed=seed)
    one, same, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c")
    )
    assert one == same != other


def test_a_folder_is_loaded_as_random_is(tmp_path, writer):
    save_random_writer(tmp_path / "tiny", seed=3)
    loaded = load_writer(str(tmp_path / "tiny"))
    assert writer.untrained
    assert not loaded.untrained
    assert loaded.write(CHATS, seeds=[1, 2], **HOW) == writer.write(CHATS, seeds=[1, 2], **HOW)


def test_layers_spread_over_the_devices_there_are_write_the_same(writer, monkeypatch):
    load, told = AutoModelForCausalLM.from_pretrained, []

    def noting(*args, **how):
        told.append(how["device_map"])
        return load(*args, **how)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)
    spread = load_writer("random", seed=3, device_map="auto")
    assert told == ["auto"]
    if not torch.cuda.is_available():
        assert spread.write(CHATS, seeds=[1, 2], **HOW) == writer.write(CHATS, seeds=[1, 2], **HOW)


def test_a_model_without_chat_template_is_refused(tmp_path):
    save_random_writer(tmp_path, seed=0)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template.*Instruct"):
        load_writer(str(tmp_path))


def test_an_unknown_hub_id_is_refused_fast_and_says_what_to_fetch():
    started = perf_counter()
    with pytest.raises(FileNotFoundError, match=r"hf download clouds-nobody/none.*bank"):
        load_writer("clouds-nobody/none")
    assert perf_counter() - started < 30


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_writer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b"cut off"),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
    ],
)
def test_files_that_are_missing_or_damaged_are_told_in_one_line(tmp_path, name, content):
    save_random_writer(tmp_path, seed=0)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^write_prompts\.model: .*(them again|Is it whole)"):
        load_writer(str(tmp_path))


def test_clip_tokens_are_counted_with_begin_and_end():
    assert count_clip_tokens("") == 2
    assert count_clip_tokens("a street with cars") == 6
