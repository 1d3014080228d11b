"""The command line: verbs and their options. Imports neither torch nor Prefect.

python flows/clouds.py --help
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows import console, submission, use, verbs
from flows.engine import Engine
from flows.options import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    EXIT_WOULD_RUN,
    recipe_options,
    selection_options,
    store_options,
)
from flows.outputs import StoreError
from flows.pipeline import Instance
from flows.recipes import ConfigError, load_recipe, nearest
from flows.steps import MissingNeedError, StageError
from flows.store import Store
from stages.launch import be_patient

_GROUPS = {
    "make": ("run", "plan", "check", "study"),
    "look": ("status", "show", "graph", "diff", "features"),
    "settings": ("recipes", "config"),
    "from and to elsewhere": ("adopt", "import", "predict", "export", "submit"),
    "keep order": ("verify", "gc"),
}
"""How `clouds --help` orders the commands; what is named nowhere comes last."""

_EPILOG = """\
A first hour:
  clouds --recipe tiny                         every stage in seconds; the report opens from disk
  clouds                                       the default recipe; what is done is skipped
  clouds graph                                 what needs what, and what is there
  clouds plan --set refine.points=9            what a setting would make run again, and why
  clouds study ablation --plan                 what a comparison over seeds would run

more examples:
  clouds plan --recipe camvid                  what would run, and why
  clouds --stage self_train --round 1          one stage alone (all its legs)
  clouds --from refine --set refine.points=9   from one stage on, with another setting
  clouds status                                what is there, what runs, what failed
  clouds diff last before-last                 how two runs differ, in settings and results
  clouds gc --older 7                          what nothing refers to any more
  clouds config show --recipe camvid           every setting with its value

A command's own options: clouds COMMAND --help. Recipes are YAML files: clouds recipes.
Stopping is always safe: Ctrl-C, kill -9, a crash. The same command goes on where it stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 done or up to date, 1 a stage failed, 2 a user's mistake, 3 `plan` found work, 130 Ctrl-C.
    """
    be_patient()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _as_interrupt)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=console.StandardError(),
    )
    try:
        words = _with_default_verb(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(words)
        return arguments.do(arguments)
    except (ConfigError, MissingNeedError, StoreError) as error:
        console.error(str(error))
        return EXIT_USAGE
    except StageError as error:
        console.stage_failed(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        console.error("stopped. Nothing finished is lost; the same command goes on from here.")
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        console.error(f"{error}; {console.NOT_SET_UP}")
        return EXIT_USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:  # a full disk, a folder that may not be read
        console.error(
            f"{error}. Nothing finished is lost; mend that, and the same command goes on."
        )
        return EXIT_FAILED


def _as_interrupt(_number: int, _frame: object) -> None:
    """SIGTERM (timeout, systemd, containers) stops a run as Ctrl-C does."""
    raise KeyboardInterrupt


def _with_default_verb(argv: Sequence[str]) -> list[str]:
    if argv and (argv[0] in _VERBS or argv[0] in {"-h", "--help", "--version"}):
        return list(argv)
    if argv and not argv[0].startswith("-"):
        raise ConfigError(f"unknown command {argv[0]!r}{nearest(argv[0], _VERBS)}")
    return ["run", *argv]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clouds",
        description="One resumable pipeline from labelled synthetic streets to a segmenter for "
        "domains without labels.",
        epilog=f"{_listing()}\n{_EPILOG}",
        usage="clouds [COMMAND] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="version and git revision")
    commands = parser.add_subparsers(
        prog="clouds", metavar="COMMAND", required=True, help="one of those below; none: run"
    )
    for name, (does, add_options, do) in _VERBS.items():
        sub = commands.add_parser(name, description=does)
        add_options(sub)
        sub.set_defaults(do=do)
    return parser


def _listing() -> str:
    """The commands in groups, one line each."""
    grouped = {name for names in _GROUPS.values() for name in names}
    rest = tuple(name for name in _VERBS if name not in grouped)
    lines = ["commands:"]
    for group, names in {**_GROUPS, "more": rest}.items():
        there = [name for name in names if name in _VERBS]
        lines += [f"  {group}"] if there else []
        lines += [f"    {name:<9} {_VERBS[name][0]}" for name in there]
    return "\n".join([*lines, ""])


class _Version(argparse.Action):
    """Says the version; looked up only when asked for, since that starts git."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from flows.provenance import facts

        found = facts()
        revision = f" ({found['git_revision']})" if found["git_revision"] else ""
        console.say(f"clouds {found['versions'].get('clouds-pipeline', 'source')}{revision}")
        parser.exit()


# Options


def _run_options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser)
    store_options(parser)
    selection_options(parser)
    parser.add_argument(
        "--runner",
        choices=("auto", "local", "prefect"),
        default="auto",
        help="auto: Prefect where PREFECT_API_URL is set, else local",
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser)
    store_options(parser)
    selection_options(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="KEY", help="a key, its beginning, or an instance's name")
    store_options(parser)
    parser.add_argument("--json", action="store_true", help="the whole manifest")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    store_options(parser)
    parser.add_argument("--full", action="store_true", help="read and digest every byte")


def _status_options(parser: argparse.ArgumentParser) -> None:
    store_options(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _adopt_options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser)
    store_options(parser)
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("path", metavar="PATH", nargs="?", help="folder or file made elsewhere")
    parser.add_argument("--round", type=int, metavar="R")
    parser.add_argument("--leg", metavar="LEG")
    parser.add_argument(
        "--undo", action="store_true", help="make the stage's own output count again"
    )


def _import_options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser)
    store_options(parser)
    parser.add_argument("file", metavar="FILE", help="CLOUDS, Rein or VLTSeg: the authors' file")
    parser.add_argument(
        "--stage",
        default="train_source",
        metavar="STAGE",
        help="whose output it becomes: train_source (default) or self_train",
    )
    parser.add_argument("--round", type=int, metavar="R")
    parser.add_argument("--leg", metavar="LEG")


def _check_options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser)
    store_options(parser)


def _submit_options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser)
    store_options(parser)
    submission.add_options(parser)


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("show", "validate", "schema"))
    recipe_options(parser)


def _no_options(_parser: argparse.ArgumentParser) -> None:
    pass


# Commands


def _engine(arguments: argparse.Namespace) -> tuple[Engine, list[Instance]]:
    from flows.runs import arrange

    return arrange(**_parameters(arguments))


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a run is named by: the parameters of the Prefect flow too."""
    return {
        "recipe": arguments.recipe,
        "artifacts": arguments.artifacts,
        "stage": arguments.stage,
        "round": arguments.round,
        "leg": arguments.leg,
        "overrides": arguments.overrides,
        "force": arguments.force,
        "from_stage": arguments.from_stage,
        "until_stage": arguments.until_stage,
    }


def _run(arguments: argparse.Namespace) -> int:
    engine, chosen = _engine(arguments)
    runner, why = _choose_runner(arguments.runner)
    console.say(f"recipe {engine.recipe.name}, runner {runner} ({why})")
    if runner == "prefect":
        os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "stages,models,flows")
        from flows.prefect_flow import run_here

        console.run_finished(engine, run_here(**_parameters(arguments)))
        return EXIT_OK
    from flows.runs import run
    from stages.launch import execute

    logging.getLogger().setLevel(engine.recipe.run.log_level.upper())
    with console.Console(beside=engine.recipe.run.beside) as listener:
        record = run(
            engine,
            chosen,
            listener=listener,
            execute=lambda spec, told, lock: execute(spec, told, keep_fds=(lock,)),
            overrides=arguments.overrides,
        )
    console.run_finished(engine, record)
    return EXIT_OK


def _choose_runner(asked: str) -> tuple[str, str]:
    if asked != "auto":
        return asked, "asked for"
    if os.environ.get("PREFECT_API_URL"):
        return "prefect", "PREFECT_API_URL is set"
    return "local", "PREFECT_API_URL is not set"


def _plan(arguments: argparse.Namespace) -> int:
    engine, chosen = _engine(arguments)
    steps = engine.plan(chosen)
    console.plan(steps, as_json=arguments.json)
    return EXIT_OK if all(step.action == "skip" for step in steps) else EXIT_WOULD_RUN


def _status(arguments: argparse.Namespace) -> int:
    from flows.inspection import status

    console.status(status(Store(Path(arguments.artifacts))), as_json=arguments.json)
    return EXIT_OK


def _show(arguments: argparse.Namespace) -> int:
    from flows.inspection import lineage, locate

    store = Store(Path(arguments.artifacts))
    folder, manifest = locate(store, arguments.what)
    console.show(folder, manifest, lineage(store, manifest), as_json=arguments.json)
    return EXIT_OK


def _verify(arguments: argparse.Namespace) -> int:
    from flows.inspection import verify

    return console.verified(verify(Store(Path(arguments.artifacts)), full=arguments.full))


def _adopt(arguments: argparse.Namespace) -> int:
    from flows.adoption import adopt, undo

    engine, instance = _engine_and_instance(arguments)
    if arguments.undo:
        console.say(undo(engine, instance))
    elif arguments.path is None:
        raise ConfigError("adopt needs a PATH (or --undo).")
    else:
        console.say(adopt(engine, instance, Path(arguments.path)))
    return EXIT_OK


def _engine_and_instance(arguments: argparse.Namespace) -> tuple[Engine, Instance]:
    """The one instance that --stage, --round and --leg name, and its recipe's engine."""
    from flows.runs import arrange

    engine, found = arrange(
        recipe=arguments.recipe,
        artifacts=arguments.artifacts,
        overrides=arguments.overrides,
        stage=arguments.stage,
        round=arguments.round,
        leg=arguments.leg,
    )
    if len(found) != 1:
        names = ", ".join(instance.name for instance in found)
        raise ConfigError(f"several instances match ({names}): name one with --round and --leg.")
    return engine, found[0]


def _import(arguments: argparse.Namespace) -> int:
    from flows.adoption import import_checkpoint

    engine, instance = _engine_and_instance(arguments)
    file = Path(arguments.file)
    console.say(import_checkpoint(engine, instance, file, say=console.say))
    return EXIT_OK


def _check(arguments: argparse.Namespace) -> int:
    from flows.check import everything

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    engine = Engine(recipe=recipe, store=Store(Path(arguments.artifacts)))
    return console.checked(everything(engine))


def _recipes(_arguments: argparse.Namespace) -> int:
    from flows.recipes import recipe_files

    console.recipes({name: load_recipe(name) for name in recipe_files()})
    return EXIT_OK


def _config(arguments: argparse.Namespace) -> int:
    if arguments.what == "schema":
        from stages.config import Recipe

        console.as_json(Recipe.model_json_schema())
        return EXIT_OK
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.what == "show":
        console.as_yaml(recipe.model_dump(mode="json"))
    else:
        engine = Engine(recipe=recipe, store=Store(Path("artifacts")))
        console.say(f"recipe {recipe.name} is valid: {len(engine.instances)} instances.")
    return EXIT_OK


_Options = Callable[[argparse.ArgumentParser], Any]
_Do = Callable[[argparse.Namespace], int]
_VERBS: dict[str, tuple[str, _Options, _Do]] = {
    "run": ("Run a recipe; what is done is skipped (the default command).", _run_options, _run),
    "plan": ("Say what a run would do, and why. Exit code 3 if anything.", _plan_options, _plan),
    "status": ("Say what is there, what runs now, what failed.", _status_options, _status),
    "show": ("Show an artifact, and its lineage up and down.", _show_options, _show),
    "verify": ("Check artifacts against their manifests.", _verify_options, _verify),
    "adopt": ("Take something made elsewhere as a stage's output.", _adopt_options, _adopt),
    "import": ("Convert a published system's checkpoint into ours.", _import_options, _import),
    "study": ("Run a family of recipes; one table with spreads.", verbs.study_options, verbs.study),
    "graph": ("Show what needs what, as text or a picture.", verbs.graph_options, verbs.graph),
    "diff": ("Say how two artifacts, runs or recipes differ.", verbs.diff_options, verbs.diff),
    "gc": ("Remove what no run refers to any more; dry by default.", verbs.gc_options, verbs.gc),
    "submit": (
        "Predict a benchmark's test pictures for its server.",
        _submit_options,
        submission.submit,
    ),
    "check": ("Look at everything a run needs, without running.", _check_options, _check),
    "predict": (
        "Label pictures, folders or videos with a trained model.",
        lambda parser: (store_options(parser), use.predict_options(parser)),
        use.predict,
    ),
    "export": (
        "Write a trained model as ONNX, checked against the original.",
        lambda parser: (store_options(parser), use.export_options(parser)),
        use.export,
    ),
    "features": (
        "Draw what models see: dense features by class and domain (t-SNE).",
        lambda parser: (store_options(parser), use.features_options(parser)),
        use.features,
    ),
    "recipes": ("List the shipped recipes.", _no_options, _recipes),
    "config": ("Show, validate or describe a recipe's settings.", _config_options, _config),
}
