"""Commands for trained models: predict, export, features.

What they do is in `stages`, imported when it runs.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows import console
from flows.inspection import locate
from flows.outputs import StoreError
from flows.recipes import ConfigError
from flows.store import LATEST, Store
from stages.contracts import Summary
from stages.use_config import ExportConfig, FeatureMapConfig, PredictConfig

EXIT_OK, EXIT_FAILED = 0, 1
_MODEL_STAGES = ("train_source", "self_train")


def predict_options(parser: argparse.ArgumentParser) -> None:
    """Options of `clouds predict`; their defaults are `PredictConfig`'s."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Leaves labels/*.png, overlays/*.jpg (or .mp4), shares/*.json and summary.json in DIR.\n"
        "What is there already is not made again. Exit code 1 if anything could not be read.\n\n"
        "  clouds predict holiday/ --out predicted\n"
        "  clouds predict drive.mp4 --model self_train@1#refined --out predicted --flip"
    )
    parser.add_argument("inputs", nargs="+", metavar="IMAGES|FOLDER|VIDEO", type=Path)
    model_options(parser)
    parser.add_argument("--device", metavar="DEVICE", help="auto (default), cpu, cuda, cuda:N")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to")
    parser.add_argument(
        "--sliding", dest="mode", action="store_const", const="slide", help="in sliding windows"
    )
    parser.add_argument("--window", type=int, metavar="PX", help="their side (default 512)")
    parser.add_argument("--stride", type=int, metavar="PX", help="their step (default 341)")
    parser.add_argument(
        "--short-side", type=int, metavar="PX", help="resize for the network (labels keep the size)"
    )
    parser.add_argument(
        "--flip", action="store_true", default=None, help="average with the mirrored picture"
    )
    parser.add_argument(
        "--scales",
        type=_scales,
        metavar="S,S,...",
        help="average over scales of the network's input, for example 0.75,1,1.25",
    )
    parser.add_argument(
        "--overlay", action=argparse.BooleanOptionalAction, help="colours over the picture"
    )
    parser.add_argument(
        "--confidence", action="store_true", default=None, help="write confidence PNGs too"
    )
    parser.add_argument(
        "--ids",
        metavar="train|palette|MAP",
        help="values of label PNGs: train ids (default), these with a palette, or the raw ids of a "
        "map of the label space (cityscapes)",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="pictures in one pass (default 4)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default fp32")


def _scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no scales; write 0.75,1,1.25") from None


def model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, for every command that uses one."""
    parser.add_argument(
        "--model",
        default="latest",
        metavar="KEY|FOLDER|latest",
        help="an artifact's key or instance, a checkpoint's folder, or the newest (default)",
    )
    parser.add_argument("--weights", choices=("model", "ema"), help="which of its weights")
    parser.add_argument(
        "--labels", metavar="NAME|FILE.yaml", help="label space, for names of maps and colours"
    )


def predict(arguments: argparse.Namespace) -> int:
    """Predict pictures, folders and videos; 1 if some could not be read."""
    config = _config(PredictConfig, arguments)
    model = find_model(Store(Path(arguments.artifacts)), arguments.model)
    summary = _work(
        "stages.predict",
        "predict",
        config=config,
        inputs=arguments.inputs,
        model=model,
        out=arguments.out,
        labels=arguments.labels or labelspace_of(model),
    )
    where = f"  [{console.place(arguments.out)}]" if arguments.out.is_dir() else ""
    console.say(summary.text + where)
    return EXIT_FAILED if summary.numbers["failed"] else EXIT_OK


def export_options(parser: argparse.ArgumentParser) -> None:
    """Options of `clouds export`; their defaults are `ExportConfig`'s."""
    parser.add_argument("--to", choices=("onnx",), default="onnx", help="the form (onnx)")
    model_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.onnx", help="where to")
    parser.add_argument(
        "--size", type=_size, metavar="HEIGHTxWIDTH", help="of the images (default 512x1024)"
    )
    parser.add_argument(
        "--batch", type=_batch, metavar="N|any", help="images at once (default 1)", default=1
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (default 20)")


def _size(text: str) -> tuple[int, int]:
    height, times, width = text.lower().partition("x")
    if not (times and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512x1024 (height x width)")
    return int(height), int(width)


def _batch(text: str) -> int | None:
    if text != "any" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor `any`")
    return None if text == "any" else int(text)


def export(arguments: argparse.Namespace) -> int:
    """Export a model as ONNX and hold the file against torch."""
    if arguments.size:
        arguments.height, arguments.width = arguments.size
    config = _config(ExportConfig, arguments).model_copy(update={"batch": arguments.batch})
    model = find_model(Store(Path(arguments.artifacts)), arguments.model)
    summary = _work(
        "stages.export",
        "export",
        config=config,
        model=model,
        out=arguments.out,
        labels=arguments.labels or labelspace_of(model),
    )
    console.say(f"{summary.text}  [{console.place(arguments.out)}]")
    return EXIT_OK


def features_options(parser: argparse.ArgumentParser) -> None:
    """Options of `clouds features`; their defaults are `FeatureMapConfig`'s."""
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        required=True,
        type=_named_model,
        metavar="NAME=KEY|FOLDER|latest",
        help="title of a panel and its model (repeat for more panels)",
    )
    parser.add_argument(
        "--data",
        metavar="KEY|FOLDER",
        help="the `prepare` artifact with the pictures (default: the first model's own)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to")
    parser.add_argument("--weights", choices=("model", "ema"), help="which of their weights")
    parser.add_argument(
        "--level", type=int, metavar="PX", help="stride of the map: 4, 8, 16 (default), 32"
    )
    parser.add_argument("--pictures", type=int, metavar="N", help="per data set (default 20)")
    parser.add_argument(
        "--points", type=int, metavar="N", help="per class and data set (default 40)"
    )
    parser.add_argument("--perplexity", type=float, metavar="P", help="of t-SNE (default 30)")
    parser.add_argument("--seed", type=int, metavar="N", help="of pixels and layout (default 0)")
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda, cuda:N"
    )


def _named_model(text: str) -> tuple[str, str]:
    name, equals, what = text.partition("=")
    if not (name and equals and what):
        raise argparse.ArgumentTypeError(f"{text!r}: write a title and a model, frozen=latest")
    return name, what


def features(arguments: argparse.Namespace) -> int:
    """Draw the features of several models side by side."""
    store = Store(Path(arguments.artifacts))
    models = {name: find_model(store, what) for name, what in arguments.models}
    summary = _work(
        "stages.feature_map",
        "features",
        config=_config(FeatureMapConfig, arguments),
        models=models,
        prepared=_prepared(store, arguments.data, next(iter(models.values()))),
        out=arguments.out,
        device=arguments.device,
    )
    console.say(f"{summary.text}  [{console.place(arguments.out)}]")
    return EXIT_OK


def _prepared(store: Store, what: str | None, model: Path) -> Path:
    """The folder of the `prepare` artifact that is named, or that a model was trained with."""
    if what is not None:
        return Path(what) if Path(what).is_dir() else locate(store, what)[0]
    part = labelspace_of(model)
    if part is None:
        raise ConfigError(
            f"the data that {console.place(model)} was trained with is not in its store: name a "
            "`prepare` artifact with --data."
        )
    return part.parent


def find_model(store: Store, what: str) -> Path:
    """The folder of a checkpoint: `latest`, a folder, or an artifact's key or instance.

    Raises:
        ConfigError: nothing of this name holds a checkpoint.
    """
    known = [folder for folder in store.artifacts() if folder.parent.name.startswith(_MODEL_STAGES)]
    there = ", ".join(sorted({f"{folder.parent.name} {folder.name}" for folder in known}))
    if what == LATEST:
        folder = store.root / LATEST / "model"
        if not (folder / "checkpoint.json").is_file():
            raise ConfigError(
                f"no model in {str(store.root)!r} yet ({there or 'no artifact of a training'}): "
                "train one with `clouds`, or name a checkpoint's folder with --model."
            )
        return folder.resolve()
    if Path(what).is_dir():
        folder = Path(what)
    else:
        try:
            folder, _ = locate(store, what)
        except (ConfigError, StoreError) as error:
            raise ConfigError(
                f"--model {what!r} is neither a folder nor an artifact ({error}). "
                f"Models here: {there or 'none'}."
            ) from None
    if not (folder / "checkpoint.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"--model {what!r}: {console.place(folder)} holds no checkpoint (checkpoint.json with "
            f"model.safetensors). Models here: {there or 'none'}."
        )
    return folder


def labelspace_of(model: Path) -> Path | None:
    """The label space that an artifact's model was trained with, if its store still holds it."""
    folder = model.resolve()
    store = Store(folder.parents[1])
    try:
        entry = store.manifest(folder)["inputs"]["labelspace"]
        part = store.folder(entry["instance"], entry["key"]) / "labelspace"
    except (StoreError, OSError, KeyError, TypeError):
        return None
    return part if (part / "labelspace.json").is_file() else None


def _config(model: type[Any], arguments: argparse.Namespace) -> Any:
    """The options that were given as a config.

    Raises:
        ConfigError: a value is out of its range.
    """
    names = model.model_fields.keys() & vars(arguments).keys()
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "".join(f"--{str(part).replace('_', '-')} " for part in first["loc"])
        got = f" (got {first['input']!r})" if first["loc"] else ""
        raise ConfigError(f"{option}{first['msg'].removeprefix('Value error, ')}{got}") from None


def _work(verb: str, name: str, **inputs: Any) -> Summary:
    """Run a verb with a progress bar; its mistakes of the user become `ConfigError`."""
    work: Callable[..., Summary] = importlib.import_module(verb).run
    with console.Console() as listener:
        progress = listener.task(name)
        try:
            return work(progress=progress, **inputs)
        except (ValueError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
            raise ConfigError(str(error)) from error
