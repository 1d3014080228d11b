"""Recipes and overrides: what they mean, and errors that help."""

import pytest

from flows.keys import differences, ingredients
from flows.pipeline import build, select
from flows.recipes import ConfigError, load_recipe, merge, recipe_files
from flows.store import Store
from flows.studies import load_study
from prompts.loader import load_bank
from stages.config import Recipe, SelectConfig


def write(folder, name, text):
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_every_shipped_recipe_is_valid_and_described(name):
    recipe = load_recipe(name)
    assert recipe.description
    instances = build(recipe)
    assert "train_source" in instances
    assert list(instances)[-1] == "report"


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_what_rule_agreement_leaves_out_is_trained_as_unknown(name):
    recipe = load_recipe(name)
    if recipe.refine.rule == "agreement":
        assert recipe.self_train.unlabelled == "ignore"


def test_defaults_fit_each_other_as_the_recipes_do():
    assert (Recipe().refine.rule, Recipe().self_train.unlabelled) == ("agreement", "ignore")


@pytest.mark.parametrize("name", sorted(n for n in recipe_files() if n.endswith("_released")))
def test_recipes_of_released_settings_refine_by_the_released_rule(name):
    recipe = load_recipe(name)
    assert (recipe.refine.rule, recipe.self_train.unlabelled) == ("released", "negative")


PAINTERS = sorted(n for n in recipe_files() if n.startswith(("clouds_", "painted_")))


@pytest.mark.parametrize("name", PAINTERS)
def test_our_own_recipes_choose_among_pictures_and_the_released_ones_take_all(name):
    recipe = load_recipe(name)
    section, spare = recipe.select, recipe.synthesize.spare
    if name.endswith("_released"):
        assert (section.rule, section.clip, spare) == ("all", None, 0)
        assert recipe.write_prompts.num_prompts == 100
    else:
        assert (section.rule, section.clip is None, spare > 0) == ("checks", False, True)
        assert min(section.min_sure_share, section.min_classes) > 0
        assert recipe.write_prompts.num_prompts < len(load_bank())  # the plan chooses
    assert not section.unread


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({}, ()),
        ({"min_kept_share": 0.5}, ()),
        ({"min_similarity": 0.9}, ("min_similarity",)),
        ({"keep_share": 0.5, "min_classes": 3}, ("keep_share", "min_classes")),
        ({"rule": "confidence", "keep_share": 0.5, "min_classes": 3}, ("min_classes",)),
        ({"rule": "checks", "keep_share": 0.5, "min_similarity": 0.9}, ("min_similarity",)),
        ({"rule": "checks", "clip": "ViT-B-32", "min_similarity": 0.9}, ()),
    ],
)
def test_thresholds_that_no_rule_reads_are_known(settings, unread):
    assert SelectConfig(**settings).unread == unread


def test_longer_training_on_the_source_is_counted_in_the_recipes_own_steps():
    study = load_study("steps")
    own = load_recipe(study.recipe).train_source.steps
    for case, settings in study.cases.items():
        assert settings["train_source.steps"] == own * int(case.removeprefix("x"))


def test_extends_merges_sections_and_replaces_lists(tmp_path):
    write(
        tmp_path,
        "base",
        "seed: 3\ntrain_source: {steps: 10, batch_size: 2}\ndata: {sources: [{name: a, root: a}]}",
    )
    path = write(
        tmp_path, "child", "extends: base.yaml\ntrain_source: {steps: 5}\ndata: {sources: []}"
    )
    recipe = load_recipe(path)
    assert recipe.name == "child"
    assert (recipe.seed, recipe.train_source.steps, recipe.train_source.batch_size) == (3, 5, 2)
    assert recipe.data.sources == ()


def test_what_a_recipe_is_called_is_its_own_and_all_the_rest_is_inherited(tmp_path):
    write(
        tmp_path,
        "base",
        "name: b\ndescription: Base.\nreport: {title: Base, num_pictures: 3}\n"
        "train_source: {augment: {crop_height: 64, scale_min: 0.7}}",
    )
    write(tmp_path, "untitled", "extends: base.yaml\nreport:\n")
    recipe = load_recipe(write(tmp_path, "child", "extends: base.yaml"))
    assert (recipe.name, recipe.description) == ("child", "")
    assert recipe.report.title == Recipe().report.title
    assert recipe.report.num_pictures == 3
    augment = recipe.train_source.augment
    assert (augment.crop_height, augment.scale_min) == (64, 0.7)
    with pytest.raises(ConfigError, match="report = None"):
        load_recipe(write(tmp_path, "grandchild", "extends: untitled.yaml"))


def test_overrides_reach_values_sections_and_list_entries(tmp_path):
    path = write(tmp_path, "r", "data: {sources: [{name: a, root: a}]}")
    recipe = load_recipe(
        path, ["train_source.optimiser.lr=0.5", "data.sources.0.root=/b", "self_train.ema=null"]
    )
    assert recipe.train_source.optimiser.lr == 0.5
    assert recipe.data.sources[0].root == "/b"
    assert recipe.self_train.ema is None


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("", ["train_source.stps=3"], r"unknown key 'train_source.stps'; did you mean 'steps'"),
        ("", ["trainsource.steps=3"], r"unknown key 'trainsource'; did you mean 'train_source'"),
        ("", ["train_source.steps=many"], r"train_source.steps = 'many': input should be a valid"),
        ("", ["train_source.steps=-1"], r"greater than 0"),
        ("", ["train_source.optimiser.lr=.inf"], r"lr = inf: input should be a finite number"),
        ("", ["train_source.augment.scale_min=3"], r"scale_min 3 is above scale_max 2: set both"),
        ("train_source: fast", [], r"train_source = 'fast': expected a section of `name: value`"),
        ("data: {sources: {name: a, root: b}}", [], r"expected a list"),
        ("legs: [a]", [], r"legs = \['a'\]: expected `name: value` pairs"),
        ("", ["train_source.steps"], r"expected dotted.key=value"),
        ("", ["seed.x=1"], r"seed"),
        ("", ["data.sources.4.root=x"], r"'4' is no entry of a list of 0"),
        ("", ["seed=[1"], r"no YAML"),
        ("data: {sources: [{name: a, rot: b}]}", [], r"data.sources.0.rot'; did you mean 'root'"),
        ("extends: missing.yaml", [], r"missing.yaml' is not there"),
        ("- a list", [], r"mapping of sections"),
        ("legs: {a: {refine.pionts: 3}}", [], r"leg 'a' .*'refine.pionts'; did you mean 'points'"),
        ("rounds: {overrides: {1: {refine.points: 0}}}", [], r"round 1 .*refine.points = 0"),
        ("legs: {'a b': {}}", [], r"letters, digits"),
        ("extends: 5", [], r"extends is 5; expected a recipe's name"),
        ("extends: [tiny, 5]", [], r"extends is \['tiny', 5\]"),
        ("data: {sources: [{name: roots, root: b}]}", [], r"'roots' is a file .*another name"),
        ("data: {sources: [{name: painted, root: b}]}", [], r"'painted' begins the ids"),
        ("run: {device: gpu}", [], r"run.device = 'gpu'"),
        ("segmenter: {decoder: {width: 30}}", [], r"decoder.width 30"),
    ],
)
def test_mistakes_are_named_with_place_and_way_out(tmp_path, text, overrides, said):
    path = write(tmp_path, "r", text or "seed: 1\ndata: {sources: []}")
    with pytest.raises(ConfigError, match=said):
        load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["legs.raw={rounds.count: 3}"], r"leg 'raw' overrides 'rounds.count', which all legs"),
        (["rounds.overrides={1: {synthesize.steps: 9}}"], r"round 1 overrides 'synthesize.steps'"),
        (["rounds.overrides={1: {train_source.steps: 9}}"], r"no stage of a round reads"),
    ],
)
def test_overrides_that_would_do_nothing_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        build(load_recipe("camvid", overrides))
    read = ["rounds.overrides={1: {synthesize.steps: 9}}", "rounds.fresh_pictures=true"]
    instances = build(load_recipe("camvid", read))
    assert instances["synthesize@1"].recipe.synthesize.steps == 9


@pytest.mark.parametrize(
    ("overrides", "rounds"),
    [
        (["rounds.fresh_pictures=true", "write_prompts.aim=0.5"], {1: None, 2: 1, 3: 2}),
        (["rounds.fresh_pictures=true"], {1: None, 2: None, 3: None}),
        (["write_prompts.aim=0.5"], {None: None}),
    ],
)
def test_a_rounds_prompts_aim_by_the_labels_of_the_round_before(overrides, rounds):
    instances = build(load_recipe("clouds_rn50_gta5", ["rounds.count=3", *overrides]))
    found = {}
    for instance in instances.values():
        if instance.stage == "write_prompts":
            inputs = {entry.role: entry.instance for entry in instance.inputs}
            found[instance.round] = inputs.get("labelled")
    expected = {at: before and f"pseudo_label@{before}" for at, before in rounds.items()}
    assert found == expected


def test_a_recipe_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("title: Stra\u00dfe".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"r\.yaml: no YAML"):
        load_recipe(str(path))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'camvid'"):
        load_recipe("camvit")


def test_a_recipe_that_extends_itself_is_refused(tmp_path):
    write(tmp_path, "a", "extends: b.yaml")
    path = write(tmp_path, "b", "extends: a.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_recipe(path)


def test_merge_does_not_change_its_arguments():
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


HELPERS = ("write_prompts", "synthesize", "pseudo_label@1", "select@1", "refine@1")


def test_legs_own_what_they_change_and_share_the_rest():
    recipe = load_recipe("camvid", ["rounds.count=2"])
    names = list(build(recipe))
    assert "refine@1" in names, "round 1 is labelled by the source model, the same for all legs"
    assert "refine@1#raw" not in names
    assert {"pseudo_label@2#raw", "pseudo_label@2#refined"} <= set(names)
    assert {"evaluate@0", "evaluate@1#control", "evaluate@2#refined"} <= set(names)
    control = build(recipe)["self_train@1#control"]
    assert {entry.role for entry in control.inputs} == {"sources", "labelspace", "teacher"}
    refined = build(recipe)["self_train@2#refined"]
    assert {entry.instance for entry in refined.inputs if entry.role == "teacher"} == {
        "self_train@1#refined"
    }


@pytest.mark.parametrize(
    ("legs", "left_out"),
    [
        ("{raw: {self_train.labels: raw}}", {"refine@1"}),
        ("{control: {self_train.labels: none}}", set(HELPERS)),
        ("{control: {self_train.labels: none}, refined: {self_train.labels: refined}}", set()),
    ],
)
def test_what_nobody_needs_is_left_out_unless_it_is_named(legs, left_out):
    instances = build(load_recipe("tiny", [f"legs={legs}"]))
    assert set(HELPERS) <= instances.keys()
    chosen = {instance.name for instance in select(instances)}
    assert instances.keys() - chosen == left_out
    everything = {entry.instance for entry in instances["report"].inputs}
    assert everything == chosen - {"report"}
    (by_name,) = select(instances, stage="refine")
    assert by_name.name == "refine@1"
    assert [instance.name for instance in select(instances, until_stage="refine")][-5:] == [
        *("synthesize", "evaluate@0", "pseudo_label@1", "select@1", "refine@1")
    ]


def test_rounds_have_settings_of_their_own_and_legs_come_last():
    second = "{refine.min_area: 7, self_train.steps: 9, self_train.mode: online}"
    instances = build(
        load_recipe(
            "tiny",
            [
                "rounds.count=2",
                f"rounds.overrides={{2: {second}}}",
                "legs={plain: {}, short: {self_train.steps: 4}}",
            ],
        )
    )
    seen = {name: instance.recipe for name, instance in instances.items()}
    assert (seen["refine@1"].refine.min_area, seen["refine@2#plain"].refine.min_area) == (48, 7)
    steps = {name: recipe.self_train.steps for name, recipe in seen.items() if "self_" in name}
    assert steps == {
        "self_train@1#plain": 6,
        "self_train@2#plain": 9,
        "self_train@1#short": 4,
        "self_train@2#short": 4,
    }
    roles = [{entry.role for entry in instances[f"self_train@{n}#plain"].inputs} for n in (1, 2)]
    assert roles[0] - roles[1] == {"labels", "selection"}


def test_a_stage_without_round_means_its_last():
    instances = build(load_recipe("camvid", ["rounds.count=2"]))
    assert [i.name for i in select(instances, stage="select", leg="raw")] == ["select@2#raw"]
    assert [i.name for i in select(instances, stage="train_source")] == ["train_source"]


def test_a_leg_alone_is_what_it_owns_and_what_that_is_made_of():
    instances = build(load_recipe("camvid"))
    assert [instance.name for instance in select(instances, leg="control")] == [
        "prepare",
        "train_source",
        "self_train@1#control",
        "evaluate@1#control",
    ]
    for leg in ("raw", "refined"):
        chosen = select(instances, leg=leg)
        made = {instance.name for instance in chosen}
        assert all(entry.instance in made for i in chosen for entry in i.inputs)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"stage": "refin"}, "did you mean 'refine'"),
        ({"stage": "refine", "round": 7}, "it has rounds 1"),
        ({"stage": "prepare", "round": 1}, "it runs once"),
        ({"stage": "self_train", "leg": "refind"}, "did you mean 'refined'"),
        ({"round": 1}, "--round goes with --stage"),
        ({"stage": "refine", "from_stage": "prepare"}, "does not go with"),
        ({"from_stage": "report", "until_stage": "prepare"}, "selects nothing"),
        ({"leg": "control", "from_stage": "refine"}, "leg 'control' does not need refine"),
    ],
)
def test_wrong_selections_are_explained(chosen, said):
    with pytest.raises(ConfigError, match=said):
        select(build(load_recipe("camvid")), **chosen)


def test_weights_and_label_space_count_in_the_keys(tmp_path):
    """Whatever file a section names, another content is another key."""
    weights = tmp_path / "clip.pt"
    space = tmp_path / "own.yaml"
    settings = [f"select.clip_weights={weights}", f"data.labels={space}"]
    settings += ["data.sources.0.name=labels", f"data.root={tmp_path}"]
    recipe = load_recipe("camvid", settings)

    def found(stage):
        weights.write_text("first")
        space.write_text("first")
        instance = build(recipe)[stage]
        first = ingredients(instance, {}, Store(tmp_path / "a"))
        weights.write_text("second")
        space.write_text("second")
        return list(differences(first, ingredients(instance, {}, Store(tmp_path / "b"))))

    assert any("select.clip_weights" in line for line in found("select@1"))
    assert found("prepare") == ["files of label space changed"]


@pytest.mark.parametrize(
    ("stage", "field"),
    [("refine@1", "refine.weights"), ("train_source", "segmenter.encoder.weights")],
)
def test_a_folder_with_a_bare_name_counts_by_what_is_in_it(tmp_path, monkeypatch, stage, field):
    """As it is loaded: from the folder, not from a hub."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "somefolder" / "weights.safetensors"
    file.parent.mkdir()
    instance = build(load_recipe("camvid", [f"{field}=somefolder"]))[stage]
    found = []
    for content in ("first", "second", "first"):
        file.write_text(content)
        store = Store(tmp_path / content)
        found.append(ingredients(instance, {}, store)["weights"][field])
    assert found[0] == found[2] != found[1]
    assert found[0].startswith("local:")


def test_a_folder_called_as_an_architecture_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RN50").mkdir()
    instance = build(load_recipe("camvid", ["segmenter.encoder.name=RN50"]))["train_source"]
    found = ingredients(instance, {}, Store(tmp_path / "store"))["weights"]
    assert found["segmenter.encoder.name"] == "hub:RN50@main"


@pytest.mark.parametrize(
    ("stage", "field", "keyword", "settings"),
    [
        ("write_prompts", "write_prompts.model", "bank", []),
        ("synthesize", "synthesize.model", "random", []),
        ("train_source", "segmenter.encoder.weights", "openai", []),
        ("train_source", "segmenter.encoder.weights", "default", []),
        ("write_prompts", "write_prompts.model", "m", ["write_prompts.server=http://h:1/v1"]),
    ],
)
def test_a_folder_called_as_a_keyword_or_a_servers_model_is_not_taken_for_it(
    tmp_path, monkeypatch, stage, field, keyword, settings
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / keyword).mkdir()

    def identity(reference, *others):
        instance = build(load_recipe("tiny", [f"{field}={reference}", *others]))[stage]
        return ingredients(instance, {}, Store(tmp_path / "store"))["weights"][field]

    assert identity(keyword, *settings) == f"hub:{keyword}@main"
    assert identity(f"local-dir:{keyword}").startswith("local:")


def test_a_setting_that_came_later_counts_only_where_it_is_set(tmp_path):
    """So that pictures painted before the setting was there are found again."""
    plain, default, checked = (
        ingredients(build(load_recipe("tiny", settings))["synthesize"], {}, Store(tmp_path))
        for settings in (
            [],
            ["synthesize.safety_checker=false"],
            ["synthesize.safety_checker=true"],
        )
    )
    assert "safety_checker" not in plain["config"]["synthesize"]
    assert plain == default
    assert list(differences(plain, checked)) == ["synthesize.safety_checker: (absent) -> True"]


@pytest.mark.parametrize(
    ("recipe", "stage", "place"),
    [
        ("miniature", "evaluate@0", "evaluate"),
        ("miniature", "train_source", "train_source.validation"),
        ("miniature", "self_train@1#refined", "self_train.validation"),
        ("rein_dinov2_l_gta5", "evaluate@0", "evaluate"),
    ],
)
def test_one_look_at_a_picture_is_no_part_of_a_key(tmp_path, recipe, stage, place):
    """So that what was judged and trained before there were flips and scales is found again."""
    sets = ["data.validation=[{name: v, layout: cityscapes, root: v}]", f"{place}.batch_size=3"]

    def key_of(*settings):
        instance = build(load_recipe(recipe, [*sets, *settings]))[stage]
        return ingredients(instance, {}, Store(tmp_path))

    plain = key_of()
    section = plain["config"]
    for part in place.split("."):
        section = section[part]
    assert section["batch_size"] == 3
    assert not section.keys() & {"flip", "scales"}
    assert key_of(f"{place}.flip=false", f"{place}.scales=[1]") == plain
    assert list(differences(plain, key_of(f"{place}.flip=true", f"{place}.scales=[0.5,1]"))) == [
        f"{place}.flip: (absent) -> True",
        f"{place}.scales: (absent) -> [0.5, 1.0]",
    ]


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("pseudo_label", ["mode=slide"]),
        ("evaluate", ["mode=slide"]),
        ("evaluate", ["protocol=rein"]),
        ("train_source", ["mode=slide"]),
    ],
)
def test_sliding_windows_with_gaps_between_them_are_refused(section, settings):
    place = f"{section}.validation" if section == "train_source" else section
    settings = [f"{place}.{each}" for each in (*settings, "window=300")]
    sets = "data.validation=[{name: v, layout: cityscapes, root: v}]"
    with pytest.raises(ConfigError, match=r"stride 341 is larger than window 300.*gaps"):
        load_recipe("tiny", [sets, *settings])
    load_recipe("tiny", [sets, *settings, f"{place}.stride=200"])
    load_recipe("tiny", [sets, *settings, f"{place}.mode=whole"])


@pytest.mark.parametrize("place", ["pseudo_label", "evaluate", "train_source.validation"])
@pytest.mark.parametrize("scales", ["[]", "[1,0]"])
def test_scales_are_at_least_one_and_above_0(place, scales):
    sets = "data.validation=[{name: v, layout: cityscapes, root: v}]"
    with pytest.raises(ConfigError, match=rf"{place}\.scales.*at least one scale, all .*above 0"):
        load_recipe("tiny", [sets, f"{place}.scales={scales}"])


def test_a_server_without_the_name_of_its_model_is_refused():
    server = "write_prompts.server=http://localhost:8000/v1"
    with pytest.raises(ConfigError, match="name of the server's model"):
        load_recipe("tiny", [server])
    assert load_recipe("tiny", [server, "write_prompts.model=m"]).write_prompts.model == "m"
