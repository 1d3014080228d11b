"""What our code never does: run a shell, unpickle freely, load unsafe YAML, extract archives."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("flows", "stages", "models", "prompts", "docker")
FORBIDDEN = {
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput"), "runs a shell"),
    **dict.fromkeys(("subprocess.getstatusoutput", "pty.spawn"), "runs a shell"),
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler"), "runs code of a file"),
    **dict.fromkeys(("joblib.load", "dill.load", "marshal.loads", "shelve.open"), "runs code"),
    **dict.fromkeys(("eval", "exec", "runpy.run_path", "torch.jit.load", "torch.hub.load"), "runs"),
    **dict.fromkeys(("yaml.unsafe_load", "yaml.full_load"), "builds any object"),
    **dict.fromkeys(("shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile"), "leads outside"),
    "tempfile.mktemp": "names a file that another may make first",
}


def calls(source: str) -> Iterator[tuple[int, str, dict[str, ast.expr]]]:
    """Every call: its line, the dotted name of what is called, its keyword arguments."""
    tree = ast.parse(source)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            known |= {here: f"{node.module}.{name}" for here, name in names.items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, _, rest = ast.unparse(node.func).partition(".")
            name = known.get(first, first) + (f".{rest}" if rest else "")
            yield node.lineno, name, {word.arg: word.value for word in node.keywords if word.arg}


def mistakes(source: str) -> Iterator[str]:
    for line, name, options in calls(source):
        given = {key: ast.unparse(value) for key, value in options.items()}
        packs = name == "zipfile.ZipFile" and given.get("mode") in ("'w'", "'x'")
        if name in FORBIDDEN and not packs:
            yield f"line {line}: {name} {FORBIDDEN[name]}"
        if given.get("shell", "False") != "False":
            yield f"line {line}: {name} runs a shell"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"line {line}: torch.load without weights_only=True"
        if given.get("weights_only", "True") != "True":
            yield f"line {line}: {name} with weights_only={given['weights_only']}"
        if name == "yaml.load" and not given.get("Loader", "").endswith(("SafeLoader", "_Loader")):
            yield f"line {line}: yaml.load without a safe loader"
        for option in ("allow_pickle", "trust_remote_code"):
            if given.get(option, "False") != "False":
                yield f"line {line}: {name} with {option}"


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_runs_a_shell_or_code_of_a_file(room):
    found = [
        f"{path.relative_to(ROOT)}, {mistake}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for mistake in mistakes(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from os import system as run\nrun('ls')",
        "import torch\ntorch.load('a.pt')",
        "import torch as t\nt.load('a.pt', weights_only=False)",
        "from torch import load\nload('a.pt')",
        "from pickle import load as get\nget(file)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "model.from_pretrained(name, trust_remote_code=True)",
        "eval('1')",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert list(mistakes(source))


def test_recipes_are_read_by_a_safe_loader():
    from yaml.constructor import SafeConstructor

    from flows import recipes

    assert issubclass(recipes._Loader, SafeConstructor)
    text = "!!python/object/apply:os.mkdir [nothing]"
    with pytest.raises(recipes.ConfigError, match="no YAML"):
        recipes.parse_override(f"name={text}")
