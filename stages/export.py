"""Export a trained segmenter as ONNX, and prove by onnxruntime that it predicts the same.

    clouds export --to onnx --model latest --out street.onnx --size 512x1024

Leaves the graph and a card beside it (`street.onnx.json`): classes with colours, what goes in and
out, which model, and the largest difference from torch that was found. Nothing is left of a graph
that does not agree.
"""

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from models.checkpoints import describe_checkpoint, load_segmenter
from models.onnx_export import INPUT, NEEDED, OUTPUT, differences, write_onnx
from stages.contracts import Progress, Summary
from stages.predictor import space_of
from stages.shards import file_digest, write_json
from stages.use_config import ExportConfig


def run(
    config: ExportConfig,
    *,
    model: Path,
    out: Path,
    progress: Progress,
    labels: Path | str | None = None,
) -> Summary:
    """Export a checkpoint.

    Args:
        config: the form of the graph.
        model: folder of the checkpoint.
        out: the ONNX file; replaced as a whole, once the new one agrees with torch.
        progress: told the three steps.
        labels: label space for the colours in the card, see `stages.predictor.load`.

    Returns:
        A summary with the numbers `difference` and `other_labels`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a package is missing, `out` is a folder, the network has no graph, or the
            graph disagrees.
    """
    _check_packages()
    if out.is_dir():
        raise ValueError(
            f"{out} is a folder: name the file to write, {out / 'street.onnx'} (--out)."
        )
    description = describe_checkpoint(model)
    space = space_of(description["label_space"], description["class_names"], labels)
    progress.start(3, "steps")
    segmenter = load_segmenter(model, which=config.weights)
    size = (config.height, config.width)
    card = {
        "classes": [{"id": c.id, "name": c.name, "colour": list(c.colour)} for c in space.classes],
        "label_space": description["label_space"],
        "input": f"{INPUT}: uint8 RGB [{config.batch or 'any number'}, 3, {size[0]}, {size[1]}]; "
        "normalisation is inside",
        "mean": segmenter.encoder.mean.flatten().tolist(),
        "std": segmenter.encoder.std.flatten().tolist(),
        "output": f"{OUTPUT}: float32 [B, {space.num_classes}, {size[0]}, {size[1]}]; the argmax "
        "over the second axis is the label",
        "encoder": description["segmenter"]["encoder"]["name"],
        "step": description["step"],
        "weights": config.weights,
        "model_digest": file_digest(model / f"{config.weights}.safetensors"),
        "key": model.resolve().name,
        "opset": config.opset,
    }
    progress.advance()

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        draft = Path(folder) / out.name
        write_onnx(
            segmenter,
            draft,
            size=size,
            batch=config.batch,
            opset=config.opset,
            properties={name: card[name] for name in ("classes", "input", "output", "key")},
        )
        progress.advance()
        difference, other = differences(segmenter, draft, size=size, batch=config.batch or 3)
        progress.advance()
        if not difference <= config.tolerance:
            raise ValueError(
                f"the exported graph differs from torch by {difference:.2g} in a score (accepted: "
                f"{config.tolerance:g}), {other:.2%} of the labels differ: nothing was written."
            )
        card["agreement"] = {"difference": difference, "other_labels": other, **_versions()}
        for path in sorted(Path(folder).iterdir(), key=lambda path: path == draft):
            path.replace(out.parent / path.name)
    write_json(out.with_name(out.name + ".json"), card)
    return Summary(
        text=f"{out.stat().st_size / 1e6:.1f} MB, opset {config.opset}; by onnxruntime the largest "
        f"difference of a score is {difference:.1e}, {other:.4%} of the labels differ",
        numbers={"difference": difference, "other_labels": other},
    )


def _check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"exporting needs {', '.join(missing)}: pip install {' '.join(missing)} (the extra "
            "`export` of this package)."
        )


def _versions() -> dict[str, Any]:
    return {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")}
