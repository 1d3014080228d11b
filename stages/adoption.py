"""Taking over what was made elsewhere: checked, and brought into the form a stage leaves.

clouds adopt train_source runs/best/ --recipe miniature
clouds import theirs.pth --recipe clouds_convnext_l_gta5_released
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import SegmenterConfig
from stages.contracts import Progress, Summary
from stages.labels import load_labelspace
from stages.prompt_files import SHOWN, doubt, read_prompts
from stages.shards import (
    Row,
    ShardJob,
    file_digest,
    numbered_lines,
    write_json,
    write_jsonl,
    write_shards,
)

if TYPE_CHECKING:
    from models.imports import ImportReport

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_SHARD_SIZE = 500


def adopt(stage: str, path: Path, *, labels: str, out: Path, progress: Progress) -> Summary:
    """Check what lies at `path` and write it to `out` as `stage` would have left it.

    Args:
        stage: `train_source` or `self_train` (a checkpoint's folder), `synthesize` (a folder of
            pictures) or `write_prompts` (a .jsonl or .txt file).
        path: the folder or file made elsewhere.
        labels: label space of the recipe, which a checkpoint's classes must be.
        out: empty folder for the outputs.
        progress: told what is done.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is not what the stage leaves, or the stage's output cannot be adopted.
    """
    if not path.exists():
        raise FileNotFoundError(f"nothing to adopt at {path}.")
    match stage:
        case "train_source" | "self_train":
            return _checkpoint(path, labels, out, progress)
        case "synthesize":
            return _pictures(path, out, progress)
        case "write_prompts":
            return _prompts(path, out, progress)
    raise ValueError(
        f"the output of {stage!r} cannot be adopted; known: train_source, self_train (a "
        f"checkpoint's folder), synthesize (a folder of pictures), write_prompts (a file)."
    )


def import_checkpoint(
    path: Path,
    *,
    segmenter: SegmenterConfig,
    labels: str,
    step: int,
    out: Path,
    progress: Progress,
) -> Summary:
    """Convert a published system's checkpoint into one of ours, as `train_source` leaves it.

    The report of all names is told line by line, whether or not the file fits; the matched names
    are in `import.json` beside the checkpoint.

    Args:
        path: the authors' file.
        segmenter: what it is a checkpoint of.
        labels: label space of its classes: a name or a YAML file.
        step: optimizer steps behind the weights.
        out: empty folder for the outputs.
        progress: told the report.

    Raises:
        FileNotFoundError: there is no such file, or weights that the config names are missing.
        ValueError: the file is of none of the known systems, or does not fit as a whole.
    """
    from models.checkpoints import load_segmenter, save_segmenter
    from models.imports import PartialMatchError, import_segmenter

    space = load_labelspace(labels)
    progress.start(1, "checkpoints")
    try:
        network, report = import_segmenter(path, config=segmenter, class_names=space.names)
    except PartialMatchError as error:
        for line in key_report(error.report):
            progress.note(line)
        raise
    for line in key_report(report):
        progress.note(line)
    save_segmenter(out, network, label_space=space.name, step=step)
    load_segmenter(out, device="cpu")
    account = {
        "origin": report.origin,
        "file": path.name,
        "digest": file_digest(path),
        "matched": report.keys.matched,
        "not_needed": report.left_out,
        "verified": report.verified,
    }
    write_json(out / "import.json", account)
    progress.advance()
    text = f"{report.origin} checkpoint of {space.num_classes} classes"
    return Summary(text=text, numbers={"tensors": len(report.keys.matched)})


def key_report(report: "ImportReport") -> Iterator[str]:
    """Lines for people: what became of every tensor; all names of those that do not fit."""
    keys = report.keys
    parts = Counter(name.partition(".")[0] for name in keys.matched)
    inside = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
    yield f"{report.origin} checkpoint"
    yield f"  matched     {len(keys.matched)}" + (f" ({inside})" if inside else "")
    if report.complete:
        yield f"  verified    {report.verified} frozen tensors equal the pre-trained weights"
    own = sum(name.startswith("backbone.") for name in report.left_out)
    if report.origin == "rein" and own:
        yield (
            f"  not compared {own} tensors of the file's own encoder: the encoder has the weights "
            "of segmenter.encoder.weights, whatever the file's are"
        )
    groups = Counter(".".join(name.split(".")[:2]) for name in report.left_out)
    outside = ", ".join(f"{group}.* {count}" for group, count in sorted(groups.items()))
    yield f"  not needed  {len(report.left_out)}" + (f" ({outside})" if outside else "")
    unfit = {
        "missing": keys.missing,
        "unexpected": keys.unexpected,
        "misshapen": keys.misshapen,
        "unknown": report.strange,
    }
    for kind, names in unfit.items():
        yield f"  {kind:<11} {len(names)}"
        yield from (f"    {name}" for name in names)


def _checkpoint(path: Path, labels: str, out: Path, progress: Progress) -> Summary:
    from models.checkpoints import describe_checkpoint, load_segmenter

    progress.start(1, "checkpoints")
    about = describe_checkpoint(path)
    space = load_labelspace(labels)
    if tuple(about["class_names"]) != tuple(space.names):
        raise ValueError(
            f"the checkpoint's classes are {_listed(about['class_names'])}, those of the recipe's "
            f"label space {labels!r} are {_listed(space.names)}: set data.labels to the one it was "
            "trained for (same names, same order)."
        )
    load_segmenter(path, device="cpu")
    names = ["checkpoint.json", "model.safetensors"]
    if (path / "ema.safetensors").is_file():
        load_segmenter(path, device="cpu", which="ema")
        names.append("ema.safetensors")
    for name in names:
        shutil.copyfile(path / name, out / name)
    progress.advance()
    return Summary(text=f"checkpoint of {len(about['class_names'])} classes")


def _listed(names: Sequence[str], most: int = 8) -> str:
    """How many, and the first of them by name."""
    more = ", ..." if len(names) > most else ""
    return f"{len(names)} ({', '.join(names[:most])}{more})"


def _pictures(path: Path, out: Path, progress: Progress) -> Summary:
    from stages.readers import read_image

    if not path.is_dir():
        raise ValueError(f"{path} is no folder of pictures.")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES)
    if not files:
        kinds = ", ".join(sorted(_PICTURES))
        raise ValueError(f"no pictures ({kinds}) below {path}.")

    for file in files:
        if not file.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"{file} is a link to {file.resolve()}, which is not below {path}: put the picture "
                "itself there."
            )

    def id_of(file: Path) -> str:
        return file.relative_to(path).with_suffix("").as_posix().replace("/", "__")

    owners: dict[str, Path] = {}
    for file in files:
        first = owners.setdefault(id_of(file), file)
        if first != file:
            raise ValueError(f"{first} and {file} would both be {id_of(file)!r}: rename one.")

    def work(chunk: Sequence[Path], folder: Path) -> Sequence[Row]:
        rows = []
        for file in chunk:
            read_image(file)
            stem = id_of(file)
            name = stem + file.suffix.lower()
            shutil.copyfile(file, folder / name)
            rows.append({"id": stem, "file": name, "prompt_id": None, "prompt": None})
            progress.advance()
        return rows

    job = ShardJob(items=files, shard_size=_SHARD_SIZE, unit="pictures", open=lambda _: work)
    write_shards(out, job, progress=progress)
    return Summary(text=f"{len(files)} pictures", numbers={"pictures": len(files)})


def _prompts(path: Path, out: Path, progress: Progress) -> Summary:
    match path.suffix.lower():
        case ".jsonl":
            rows = read_prompts(path, ids=False)
        case ".txt":
            rows = [
                {"id": f"{place:05d}", "text": line}
                for place, (_, line) in enumerate(numbered_lines(path))
            ]
        case _:
            raise ValueError(
                f"{path} is no prompts file: prompts come as .txt (one a line) or .jsonl (one "
                'object with a "text" a line).'
            )
    if not rows:
        raise ValueError(f"{path} holds no prompts.")
    _must_be_prompts([row["text"].strip() for row in rows], path)
    progress.start(len(rows), "prompts")
    whole = [
        {
            "id": row["id"],
            "text": row["text"].strip(),
            "attributes": row.get("attributes", {}),
            "classes": row.get("classes", []),
            "model": row.get("model", "adopted"),
            "seed": row.get("seed"),
        }
        for row in rows
    ]
    write_jsonl(out / "prompts.jsonl", whole)
    progress.advance(len(rows))
    return Summary(text=f"{len(rows)} prompts", numbers={"prompts": len(rows)})


def _must_be_prompts(texts: Sequence[str], path: Path) -> None:
    """Refuse what is a list of something else.

    Raises:
        ValueError: names the first doubtful texts, and why.
    """
    doubtful = [
        f"prompt {place} ({text[:40]!r}{'...' if len(text) > 40 else ''}) {why}"
        for place, text in enumerate(texts, start=1)
        if (why := doubt(text)) is not None
    ]
    if doubtful:
        more = f"\n  and {len(doubtful) - SHOWN} more" if len(doubtful) > SHOWN else ""
        raise ValueError(
            f"{path} does not look like prompts:\n  " + "\n  ".join(doubtful[:SHOWN]) + more
        )
