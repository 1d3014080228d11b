"""`clouds submit`: predictions of a model for a benchmark's test server."""

import argparse
import importlib
from pathlib import Path

from flows import console
from flows.recipes import ConfigError, load_recipe
from flows.store import Store
from flows.use import find_model
from stages.config import StageConfig

EXIT_OK = 0
SERVERS = ("cityscapes", "acdc")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options beside those of the recipe and the store."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Writes PNGs at the pictures' own size and a zip to upload: Cityscapes label ids, ACDC\n"
        "train ids. The recipe's section `evaluate` says how the network sees a picture.\n\n"
        "  clouds submit acdc --root data/acdc --model self_train@1 --out acdc_test"
    )
    parser.add_argument("server", choices=SERVERS, help="whose test pictures")
    parser.add_argument("--root", required=True, type=Path, help="folder of the data set")
    parser.add_argument(
        "--model",
        default="latest",
        metavar="KEY|FOLDER|latest",
        help="an artifact's key or instance, a checkpoint's folder, or the newest (default)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to")
    parser.add_argument("--split", default="test", help="which pictures (default test)")


def submit(arguments: argparse.Namespace) -> int:
    """Predict and pack; what is there already is not made again.

    Raises:
        ConfigError: no such model, or what the stage refuses.
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    model = find_model(Store(Path(arguments.artifacts)), arguments.model)
    work = importlib.import_module("stages.submission")
    try:
        with console.Console() as listener:
            summary = work.run(
                StageConfig(recipe, stage="submit", sections=("evaluate",)),
                out=arguments.out,
                progress=listener.task("submit"),
                model=model,
                root=arguments.root.expanduser(),
                server=arguments.server,
                split=arguments.split,
            )
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    console.say(f"{summary.text}  [{console.place(arguments.out)}]")
    return EXIT_OK
