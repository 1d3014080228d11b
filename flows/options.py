"""Options that several commands share, and what exit codes mean."""

import argparse
import os

from stages.contracts import STAGE_NAMES

DEFAULT_RECIPE = "miniature"
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_WOULD_RUN, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def store_options(parser: argparse.ArgumentParser) -> None:
    """Where artifacts lie."""
    parser.add_argument(
        "--artifacts",
        default=os.environ.get("CLOUDS_ARTIFACTS", "artifacts"),
        metavar="DIR",
        help="folder of all artifacts (default: $CLOUDS_ARTIFACTS or ./artifacts)",
    )


def recipe_options(parser: argparse.ArgumentParser) -> None:
    """Which recipe, and overrides."""
    parser.add_argument(
        "--recipe",
        default=os.environ.get("CLOUDS_RECIPE", DEFAULT_RECIPE),
        metavar="NAME|FILE.yaml",
        help="a shipped recipe or a file (default: $CLOUDS_RECIPE or %(default)s)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, for example train_source.steps=100 (may be repeated)",
    )


def selection_options(parser: argparse.ArgumentParser) -> None:
    """Which of its instances."""
    stages = ", ".join(STAGE_NAMES)
    parser.add_argument("--stage", metavar="STAGE", help=f"this stage alone: {stages}")
    parser.add_argument("--round", type=int, metavar="R", help="with --stage: round (default last)")
    parser.add_argument("--leg", metavar="LEG", help="only this leg of the recipe")
    parser.add_argument("--from", dest="from_stage", metavar="STAGE", help="start at this stage")
    parser.add_argument("--until", dest="until_stage", metavar="STAGE", help="end with this stage")
    parser.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STAGE",
        help="run this stage even if it is done (may be repeated)",
    )
