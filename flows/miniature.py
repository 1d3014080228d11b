"""Pre-train the miniature's networks by the same engine and store as the pipeline.

python flows/miniature.py                              all of it; hours on two cores
python flows/miniature.py --stage pretrain_sam         one stage; goes on where it was interrupted
python flows/miniature.py --set pretrain_sam.steps=20000
python flows/miniature.py plan                         what would run, and why
python flows/miniature.py ship [--network clip]        copy what passed its gate, with its card

What comes out lies in `artifacts/`; `ship` copies the networks that passed their gates
(`measure_clip`, `measure_sam`, `measure_writer`, `measure_painter`) into `models/miniature/`.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parents[1])
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = _ROOT  # not flows/: its modules would hide others of the same name
elif _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from flows import console  # noqa: E402
from flows.engine import Engine  # noqa: E402
from flows.outputs import StoreError  # noqa: E402
from flows.pipeline import select  # noqa: E402
from flows.recipes import ConfigError, parse_override, set_dotted, validate  # noqa: E402
from flows.runs import run  # noqa: E402
from flows.steps import MissingNeedError, StageError  # noqa: E402
from flows.store import Store  # noqa: E402
from models.config import MINIATURE_DIR  # noqa: E402
from stages.contracts import Contract, External, Need  # noqa: E402
from stages.launch import execute  # noqa: E402
from stages.model_cards import write_card  # noqa: E402
from stages.pretrain_config import PretrainRecipe  # noqa: E402

NETWORKS = ("clip", "sam", "writer", "painter")


def _words(_recipe: Any) -> dict[str, External]:
    """What the writer is told, and the phrases it learns."""
    prompts = Path(_ROOT) / "prompts"
    return {
        "prompts": External(
            base=prompts, paths=(prompts / "attributes.yaml", prompts / "writer.yaml")
        ),
        "phrases": External(base=MINIATURE_DIR, paths=(MINIATURE_DIR / "writer_phrases.yaml",)),
    }


CONTRACTS: tuple[Contract, ...] = (
    Contract(
        name="pretrain_clip",
        version=1,
        verb="stages.pretrain_clip",
        does="Train the miniature CLIP on rendered web pictures and their captions.",
        sections=("pretrain_clip",),
        numeric=True,
    ),
    Contract(
        name="pretrain_sam",
        version=2,
        verb="stages.pretrain_sam",
        does="Train the miniature SAM on rendered web pictures and noisy prompts.",
        sections=("pretrain_sam",),
        weights=("pretrain_sam.start",),
        numeric=True,
    ),
    *(
        Contract(
            name=f"measure_{network}",
            version=2,
            verb="stages.measure_miniature",
            does="Measure it on web pictures that no training saw.",
            sections=("measure_miniature",),
            needs=(Need(role=network, stage=f"pretrain_{network}"),),
            numeric=True,
        )
        for network in ("clip", "sam")
    ),
    Contract(
        name="pretrain_writer",
        version=3,
        verb="stages.pretrain_writer",
        does="Train the miniature's writer on planned requests and sentences put together.",
        sections=("pretrain_writer",),
        weights=("pretrain_writer.start",),
        externals=_words,
        numeric=True,
    ),
    Contract(
        name="measure_writer",
        version=2,
        verb="stages.measure_writer",
        does="Have it answer a plan that no training saw, and judge every reply.",
        sections=("measure_writer",),
        needs=(Need(role="writer", stage="pretrain_writer"),),
        externals=_words,
        numeric=True,
    ),
    Contract(
        name="pretrain_painter",
        version=2,
        verb="stages.pretrain_painter",
        does="Train the miniature's painter on rendered web pictures and sentences about them.",
        sections=("pretrain_painter",),
        weights=("pretrain_painter.start",),
        numeric=True,
    ),
    Contract(
        name="measure_painter",
        version=2,
        verb="stages.measure_painter",
        does="Have it paint captions that no training saw, and judge what the pictures show.",
        sections=("measure_painter",),
        needs=(Need(role="painter", stage="pretrain_painter"),),
        weights=("measure_painter.clip",),
        numeric=True,
    ),
)
"""The stages of the pre-training, each after everything it needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, plan or ship; 0 when all went well, 2 for a user's mistake, 1 otherwise."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level="INFO", format="%(message)s")
    try:
        engine = Engine(
            recipe=make_recipe(arguments.overrides),
            store=Store(Path(arguments.artifacts)),
            contracts=CONTRACTS,
            command="python flows/miniature.py",
        )
        chosen = select(engine.instances, stage=arguments.stage)
        if arguments.verb == "plan":
            for step in engine.plan(chosen):
                console.say(f"{step.action.upper():<8}{step.instance.name:<22}{step.reason}")
            return 0
        if arguments.verb == "ship":
            networks = [arguments.network] if arguments.network else NETWORKS
            return ship(engine, Path(arguments.into), networks, below_gate=arguments.below_gate)
        with console.Console(beside=engine.recipe.run.beside) as listener:
            run(
                engine,
                chosen,
                listener=listener,
                execute=lambda spec, told, lock: execute(spec, told, keep_fds=(lock,)),
                overrides=arguments.overrides,
            )
    except (ConfigError, MissingNeedError, StoreError) as error:
        console.error(str(error))
        return 2
    except StageError as error:
        console.error(str(error))
        return 1
    return 0


def ship(
    engine: Engine, into: Path, networks: Sequence[str], *, below_gate: str | None = None
) -> int:
    """Copy the networks that passed their gates, with cards; 1 if any did not.

    Args:
        engine: of the pre-trainings.
        into: one folder per network goes here.
        networks: which.
        below_gate: why a network ships that did not pass; its card says so.

    Raises:
        MissingNeedError: one was not trained or measured under these settings.
    """
    shipped = 0
    for name in networks:
        measured = engine.artifact_of(f"measure_{name}").folder / "gates.json"
        gates = json.loads(measured.read_text(encoding="utf-8"))[name]
        if not gates["passed"] and below_gate is None:
            console.say(f"{name}: not shipped, its gate was not passed (see {measured})")
            continue
        artifact = engine.artifact_of(f"pretrain_{name}")
        folder = into / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            artifact.folder,
            folder,
            ignore=shutil.ignore_patterns("manifest.json", "logs"),
            copy_function=shutil.copyfile,
        )
        write_card(folder, name, manifest=artifact.manifest, gates=gates, below_gate=below_gate)
        console.say(f"{name}: shipped to {folder}")
        shipped += 1
    return int(shipped < len(networks))


def make_recipe(overrides: Sequence[str] = ()) -> PretrainRecipe:
    """The pre-training's recipe with dotted overrides.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        set_dotted(tree, *parse_override(override))
    return validate(tree, model=PretrainRecipe, place="pre-training")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miniature", description=__doc__.splitlines()[0])
    parser.add_argument("verb", nargs="?", choices=("run", "plan", "ship"), default="run")
    parser.add_argument("--stage", choices=[contract.name for contract in CONTRACTS])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR")
    parser.add_argument("--network", choices=NETWORKS, help="ship this one alone")
    parser.add_argument(
        "--below-gate", metavar="REASON", help="ship even what did not pass; the card says why"
    )
    parser.add_argument("--into", default=str(MINIATURE_DIR), metavar="DIR", help="where to ship")
    return parser


if __name__ == "__main__":
    sys.exit(main())
