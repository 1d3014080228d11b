"""The house: who may import whom, what stands at the root, what the README says is there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stages.contracts import CONTRACTS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("flows", "stages", "models", "prompts")
TORCH_AND_FRIENDS = {
    *("torch", "torchvision", "open_clip", "timm", "diffusers", "transformers", "accelerate"),
    *("peft", "segment_anything", "safetensors"),
}
MAY_IMPORT = {
    "flows": {"flows", "stages", "models"},
    "stages": {"stages", "models", "prompts"},
    "models": {"models"},
    "prompts": {"prompts"},
}
VERBS = {contract.verb.split(".")[1] for contract in CONTRACTS}


def sources(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports(path):
    """Dotted names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import says too little of where to"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_table_allows(room):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imports(path)
        if (top := name.split(".")[0]) in ROOMS and top not in MAY_IMPORT[room]
    ]
    assert not wrong


def test_flows_use_no_torch_and_of_models_only_the_config():
    wrong = []
    for path in sources("flows"):
        for name in imports(path):
            if name.split(".")[0] in TORCH_AND_FRIENDS:
                wrong.append(f"{path.name} imports {name}")
            if name.startswith("models") and not name.startswith("models.config"):
                wrong.append(f"{path.name} imports {name}")
    assert not wrong


def test_only_the_flow_knows_prefect():
    wrong = [
        f"{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in sources(room)
        if any(name.split(".")[0] == "prefect" for name in imports(path))
        and path != ROOT / "flows" / "prefect_flow.py"
    ]
    assert not wrong


def test_nothing_in_stages_imports_a_verb():
    assert {"train_source", "evaluate", "refine", "prepare"} <= VERBS
    wrong = [
        f"{path.name} imports {name}"
        for path in sources("stages")
        for name in imports(path)
        if name.startswith("stages.") and name.split(".")[1] in VERBS
    ]
    assert not wrong


def test_no_drawers_for_odds_and_ends():
    names = [path.name for room in ROOMS for path in sources(room)]
    assert not {"utils.py", "common.py", "helpers.py", "misc.py"} & set(names)


def test_docker_is_no_package():
    assert not (ROOT / "docker" / "__init__.py").exists()


@pytest.mark.parametrize(
    "module", ["flows.cli", "stages.contracts", "stages.config", "stages.launch"]
)
def test_what_plans_imports_no_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'prefect'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_works_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "flows" / "clouds.py"), "recipes"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "miniature" in done.stdout


def test_the_readme_shows_the_tree_that_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("<!-- tree -->")[1]
    named = set(re.findall(r"^[ │├└─]*([\w.-]+\.py)\b", tree, flags=re.MULTILINE))
    there = {
        path.name for room in ROOMS for path in (ROOT / room).glob("*.py") if path.name[0] != "_"
    }
    assert named - there == set(), "the README names files that are not there"
    assert there - named == set(), "the README leaves files out"
