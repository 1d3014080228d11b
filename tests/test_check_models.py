"""What `check` and `run` tell of models, servers and rules before any work."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest

from flows.check import look, preflight
from flows.cli import main
from flows.engine import Engine
from flows.recipes import ConfigError, load_recipe
from flows.steps import Step
from flows.store import Store
from models.config import EncoderConfig
from models.painter import known_schedulers
from stages import fitness


def told(tmp_path, *settings, state="error"):
    """What is found of one state: field -> text."""
    engine = Engine(recipe=load_recipe("tiny", settings), store=Store(tmp_path / "artifacts"))
    found = look(list(engine.instances.values()), store=engine.store)
    return {finding.what: finding.text for finding in found if finding.state == state}


THERE = {"id": "there", "siblings": []}
NOT_THERE = (404, "RepoNotFound", {})


@contextmanager
def hub(monkeypatch, tmp_path, *known, **answers):
    """A hub that knows some models, and answers (status, error code, content) for others.

    It notes the paths that it was asked.
    """
    answers = {path: (200, None, THERE) for path in known} | answers
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path.partition("?")[0].removeprefix("/api/models/"))
            status, code, told = answers.get(asked[-1], NOT_THERE)
            content = told.encode() if isinstance(told, str) else json.dumps(told).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    online(monkeypatch, tmp_path, f"http://127.0.0.1:{http.server_address[1]}")
    try:
        yield asked
    finally:
        http.shutdown()
        http.server_close()


def online(monkeypatch, tmp_path, address):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in {
        "ENDPOINT": address,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


@pytest.mark.parametrize(
    "setting",
    [
        "refine.weights=weights/nothere.pth",
        "refine.weights=owner/name",
        "write_prompts.model=./no/folder",
        "write_prompts.model=~/models/writer",
        "synthesize.model=/no/such/painter",
        "segmenter.encoder.weights=weights/x.pth",
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_and_no_hub_id(tmp_path, setting, monkeypatch):
    monkeypatch.chdir(tmp_path)
    field, _, reference = setting.partition("=")
    text = told(tmp_path, setting, "refine.model=vit_b")[field]
    assert text.startswith(f"there is no file or folder {reference} ")
    assert "hf download" not in text


def test_a_missing_file_stops_a_run_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["run", "--recipe", "tiny", "--artifacts", "artifacts", "--until", "refine"]
    assert main([*words, "--set", "refine.weights=weights/nothere.pth"]) == 2
    assert "there is no file or folder weights/nothere.pth" in capsys.readouterr().err
    assert not list((tmp_path / "artifacts").glob("*/*/manifest.json"))


def test_the_hub_is_asked_where_it_can_be_asked(tmp_path, monkeypatch):
    fields = ("write_prompts.model", "synthesize.model")
    settings = [f"{fields[0]}=owner/typo", f"{fields[1]}=nosuch"]
    with hub(monkeypatch, tmp_path, "owner/there", "plain"):
        wrong = told(tmp_path, *settings)
        assert "'owner/typo' is no folder here and no model of the hub" in wrong[fields[0]]
        assert "'nosuch' is no folder here and no model of the hub" in wrong[fields[1]]
        right = [f"{fields[0]}=owner/there", f"{fields[1]}=plain"]
        assert not told(tmp_path, *right)
        assert "hf download owner/there" in told(tmp_path, *right, state="warning")[fields[0]]
    online(monkeypatch, tmp_path, "http://127.0.0.1:9")
    assert not told(tmp_path, *settings)
    assert "not reached" in told(tmp_path, *settings, state="warning")[fields[0]]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in told(tmp_path, *settings)[fields[0]]


@pytest.mark.parametrize("content", ["<html>Please log in</html>", {}, [], "null"])
def test_an_answer_that_is_no_hubs_is_a_warning(tmp_path, monkeypatch, content):
    field, setting = "write_prompts.model", "write_prompts.model=owner/name"
    with hub(monkeypatch, tmp_path, **{"owner/name": (200, None, content)}):
        assert not told(tmp_path, setting)
        text = told(tmp_path, setting, state="warning")[field]
    assert "the hub answered: no description of a model" in text
    assert "hf download owner/name" in text


@pytest.mark.parametrize("asks", [True, False])
def test_a_gated_model_is_an_error_that_names_the_licence_and_the_token(
    tmp_path, monkeypatch, asks
):
    """Some hubs describe a gated model to all and refuse its files, some refuse both."""
    refused = (403, "GatedRepo", {})
    described = (200, None, {**THERE, "gated": "manual"})
    answers = {"owner/name/auth-check": refused, "owner/name": described if asks else refused}
    setting = "write_prompts.model=owner/name"
    with hub(monkeypatch, tmp_path, **answers):
        text = told(tmp_path, setting)["write_prompts.model"]
    assert "HF_TOKEN" in text
    assert "/owner/name" in text.partition("http://127.0.0.1:")[2]
    answers |= {"owner/name": described, "owner/name/auth-check": (200, None, {})}
    with hub(monkeypatch, tmp_path, **answers):
        assert not told(tmp_path, setting)
    del answers["owner/name/auth-check"]  # a mirror that does not know the question
    with hub(monkeypatch, tmp_path, **answers):
        assert not told(tmp_path, setting)


def test_a_hub_that_refuses_was_reached(tmp_path, monkeypatch):
    with hub(monkeypatch, tmp_path, **{"owner/name": (403, None, {})}):
        warned = told(tmp_path, "write_prompts.model=owner/name", state="warning")
    assert "the hub answered: " in warned["write_prompts.model"]
    assert "not reached" not in warned["write_prompts.model"]


def test_hub_and_server_are_asked_once_for_all_instances(tmp_path, monkeypatch):
    settings = ["rounds.count=3", "rounds.fresh_pictures=true", "write_prompts.model=owner/typo"]
    with hub(monkeypatch, tmp_path) as asked:
        assert "write_prompts.model" in told(tmp_path, *settings)
    assert asked.count("owner/typo") == 1


def test_what_perhaps_does_not_run_needs_no_network(tmp_path, monkeypatch):
    settings = ["write_prompts.model=owner/name", "write_prompts.server=http://127.0.0.1:9/v1"]
    settings += ["synthesize.model=owner/gone", "refine.weights=weights/nothere.pth"]
    engine = Engine(recipe=load_recipe("tiny", settings), store=Store(tmp_path / "artifacts"))
    pending = list(engine.instances.values())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    unsure = frozenset(engine.instances)
    states = {f.what: f for f in look(pending, store=engine.store, unsure=unsure)}
    assert states["write_prompts.server"].state == "warning"
    assert states["synthesize.model"].state == "warning"
    assert "turns out not to be done" in states["synthesize.model"].text
    assert states["refine.weights"].state == "error"  # its content is a part of the key
    sure = look(pending, store=engine.store, unsure=unsure - {"synthesize"})
    assert next(f for f in sure if f.what == "synthesize.model").state == "error"


def test_a_run_of_what_may_be_done_passes_without_the_server_that_made_it(tmp_path):
    store = Store(tmp_path / "artifacts")
    settings = ["write_prompts.model=m", "write_prompts.server=http://127.0.0.1:9/v1"]
    engine = Engine(recipe=load_recipe("tiny", settings), store=store)
    step = Step(instance=engine.instances["write_prompts"], action="may run", reason="")
    said = []
    preflight([step], store=store, listener=SimpleNamespace(say=said.append))
    assert any("nobody answers" in text for text in said)
    with pytest.raises(ConfigError, match="nobody answers"):
        preflight([replace(step, action="run")], store=store, listener=SimpleNamespace(say=print))


def test_a_label_space_that_cannot_be_read_says_nothing_of_rules(tmp_path):
    assert "refine.rule" not in told(tmp_path, "refine.rule=guided", "data.labels=nosuch")


def test_a_model_that_the_server_lacks_is_told_once_under_its_name(tmp_path, monkeypatch):
    with hub(monkeypatch, tmp_path, **{"/v1/models": (200, None, {"data": [{"id": "other"}]})}):
        server = f"{huggingface_hub.constants.ENDPOINT}/v1"
        found = told(tmp_path, f"write_prompts.server={server}", "write_prompts.model=m")
    assert "write_prompts.server" not in found
    assert found["write_prompts.model"].endswith("serves other; not 'm'")
    assert "write_prompts" not in found["write_prompts.model"]


def test_what_does_not_fit_is_told_before_any_work(tmp_path):
    writer = tmp_path / "writer"
    writer.mkdir()
    (writer / "tokenizer_config.json").write_text("{}")
    sam = tmp_path / "sam.pth"
    with sam.open("wb") as file:
        file.truncate(375_050_000)  # no disk is used
    (tmp_path / "own.yaml").write_text(
        "name: own\nclasses:\n- {id: 0, name: road, colour: [1, 2, 3]}\n"
        "- {id: 1, name: cow, colour: [1, 2, 4]}\nmaps: {}\n"
    )
    settings = {
        "write_prompts.model": str(writer),
        "synthesize.scheduler": "EulerSheduler",
        "select.rule": "checks",
        "select.clip": "ViT-B-33",
        "refine.rule": "guided",
        "refine.model": "vit_h",
        "refine.weights": str(sam),
        "data.labels": str(tmp_path / "own.yaml"),
    }
    found = told(tmp_path, *(f"{name}={value}" for name, value in settings.items()))
    expected = {
        "write_prompts.model": "no chat template",
        "synthesize.scheduler": "EulerDiscreteScheduler",
        "select.clip": "open_clip has no 'ViT-B-33'; nearest: ViT-B-32",
        "refine.weights": "has 375 MB as vit_b, and refine.model is vit_h",
        "refine.rule": "cow",
    }
    for what, text in expected.items():
        assert text in found[what]
    (writer / "chat_template.jinja").touch()
    settings |= {"synthesize.scheduler": "EulerDiscreteScheduler", "select.clip": "ViT-B-32"}
    settings |= {"refine.rule": "majority", "refine.model": "vit_b"}
    found = told(tmp_path, *(f"{name}={value}" for name, value in settings.items()))
    assert not found.keys() & expected.keys()


def test_a_server_that_nobody_runs_is_told_before_any_work(tmp_path):
    settings = ["write_prompts.server=http://127.0.0.1:9/v1", "write_prompts.model=m"]
    found = told(tmp_path, *settings)
    assert found["write_prompts.server"].startswith("nobody answers at http://127.0.0.1:9/v1")


def test_variants_of_sam_that_nobody_knows_or_without_sizes_are_refused():
    with pytest.raises(ConfigError, match="vit_x"):
        load_recipe("tiny", ["refine.model=vit_x"])
    with pytest.raises(ConfigError, match=r"folder with config\.json"):
        load_recipe("tiny", ["refine.model=config", "refine.weights=null"])


@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        ({"name": "RN51"}, "nearest: RN50"),
        ({"name": "RN50", "weights": "openia"}, "unknown 'openia'; nearest: openai"),
        ({"name": "RN50", "weights": "openai"}, None),
        ({"family": "timm", "name": "vit_larg_patch14_dinov2"}, "nearest: vit_large_patch14_dinov"),
        ({"family": "timm", "name": "resnet50", "weights": "a1_in2k"}, "nearest: a1_in1k"),
        ({"family": "timm", "name": "resnet50", "weights": "a1_in1k"}, None),
        ({"family": "transformers", "name": "mit-b6"}, "nearest: mit-b"),
        ({"family": "sam", "name": "vit_g"}, "nearest: vit_"),
        ({"name": "builtin:clip", "weights": "builtin:clip"}, None),
    ],
)
def test_names_and_tags_that_no_library_knows_are_told(encoder, text):
    problem = fitness.encoder_problem(EncoderConfig(**encoder))
    assert problem is None if text is None else text in problem


def test_a_clips_tag_is_looked_up():
    assert "nearest: laion2b_s34b_b79k" in fitness.clip_tag_problem("ViT-B-32", "laion2b_s34b_b79")
    assert fitness.clip_tag_problem("ViT-B-32", "openai") is None
    assert "needs select.clip_weights" in fitness.clip_tag_problem("ViT-B-32", None)


def test_names_read_from_files_are_those_of_the_libraries():
    assert [name for name in known_schedulers() if fitness.scheduler_problem(name)] == []
    assert [name for name in open_clip.list_models() if fitness.clip_problem(name)] == []


def test_a_tag_in_the_name_that_loads_nothing_is_told(tmp_path):
    name = "segmenter.encoder.name=eva02_large_patch14_224.mim_m38m"
    settings = [name, "segmenter.encoder.family=timm", "segmenter.encoder.weights=null"]
    warned = told(tmp_path, *settings, state="warning")["segmenter.encoder.weights"]
    assert "random weights" in warned
    assert "encoder.weights=mim_m38m" in warned
    settings[2] = "segmenter.encoder.weights=mim_m38m"
    assert "segmenter.encoder.weights" not in told(tmp_path, *settings, state="warning")


def test_our_painted_recipes_clip_is_looked_for_before_any_work(tmp_path, monkeypatch):
    engine = Engine(
        recipe=load_recipe("clouds_convnext_l_gta5"), store=Store(tmp_path / "artifacts")
    )
    online(monkeypatch, tmp_path, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = look([engine.instances["select@1"]], store=engine.store)
    (finding,) = (finding for finding in found if finding.what == "select.clip")
    assert finding.state == "error"
    assert "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in finding.text


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        (["write_prompts.model=bank"], ["rounds.count=2", "the bank writes nothing new"]),
        (["rounds.fresh_pictures=true", "rounds.count=2"], ["the bank writes nothing new"]),
        (["write_prompts.model=random"], ["rounds.count=2"]),
        (["write_prompts.model=random", "rounds.fresh_pictures=true", "rounds.count=2"], []),
    ],
)
def test_aim_that_nothing_follows_is_a_warning(tmp_path, settings, lacking):
    found = told(tmp_path, "write_prompts.aim=1", *settings, state="warning")
    text = found.get("write_prompts.aim", "")
    assert [part in text for part in lacking] == [True] * len(lacking)
    assert bool(text) == bool(lacking)


def test_a_selection_that_online_training_passes_by_is_a_warning(tmp_path):
    settings = ["self_train.mode=online", "synthesize.num_images=8", "synthesize.spare=0.5"]
    field = "self_train.mode"
    text = told(tmp_path, *settings, "select.rule=checks", state="warning")[field]
    assert "select.rule=checks chooses nothing" in text
    assert "4 spares" in text
    assert field not in told(tmp_path, settings[0], "select.rule=all", state="warning")
    settings[0] = "self_train.mode=offline"
    assert field not in told(tmp_path, *settings, "select.rule=checks", state="warning")
