"""Segmenters on disk: a folder that can rebuild itself and holds only what is trained.

`model.safetensors` (and `ema.safetensors`) hold the trained tensors, `checkpoint.json` the config,
the class names, the step and which frozen weights belong to it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from models.build import build_segmenter
from models.config import SegmenterConfig
from models.segmenter import Segmenter

FORMAT = 1
"""Raised when the folder's layout changes."""


@dataclass(frozen=True)
class KeyReport:
    """How the tensors of a file fit a network."""

    matched: tuple[str, ...]
    """In both, with the same shape."""
    missing: tuple[str, ...]
    """Of the network, not in the file."""
    unexpected: tuple[str, ...]
    """In the file, not of the network."""
    misshapen: tuple[str, ...]
    """In both with different shapes, as `name: file shape, network shape`."""

    @property
    def complete(self) -> bool:
        """Nothing is missing, unexpected or misshapen."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} tensors matched"]
        for kind in ("missing", "unexpected", "misshapen"):
            names = getattr(self, kind)
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"{len(names)} {kind}: {', '.join(names[:8])}{more}")
        return "; ".join(lines)


def compare_keys(
    file: Mapping[str, torch.Tensor], network: Mapping[str, torch.Tensor]
) -> KeyReport:
    """Compare the names and shapes of a file's tensors with a network's."""
    both = sorted(file.keys() & network.keys())
    misshapen = [n for n in both if file[n].shape != network[n].shape]
    return KeyReport(
        matched=tuple(n for n in both if n not in set(misshapen)),
        missing=tuple(sorted(network.keys() - file.keys())),
        unexpected=tuple(sorted(file.keys() - network.keys())),
        misshapen=tuple(
            f"{n}: {tuple(file[n].shape)}, {tuple(network[n].shape)}" for n in misshapen
        ),
    )


def saved_state(segmenter: Segmenter) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: the trained tensors, and a frozen encoder if its weights are random.

    Pre-trained frozen weights are found again by the config; random ones are nowhere else.
    """
    state = segmenter.trained_state()
    if segmenter.config.encoder.weights is None:
        state |= {n: v for n, v in segmenter.state_dict().items() if n.startswith("encoder.")}
    return state


def frozen_digest(segmenter: Segmenter) -> str:
    """SHA-256 over the names and bytes of all tensors that a checkpoint does not hold."""
    saved = saved_state(segmenter).keys()
    digest = hashlib.sha256()
    for name, value in sorted(segmenter.state_dict().items()):
        if name not in saved:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_segmenter(
    folder: Path,
    segmenter: Segmenter,
    *,
    label_space: str,
    step: int,
    class_names: Sequence[str] | None = None,
    ema: Mapping[str, torch.Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint into a folder (made if need be; same content, same bytes).

    Args:
        folder: where to.
        segmenter: built by `build_segmenter`.
        label_space: name of the label space of the classes.
        step: optimizer steps behind these weights.
        class_names: must be the segmenter's own, if given.
        ema: state of its moving average, written beside.
        extra: more for `checkpoint.json`; must be JSON.
    """
    if class_names is not None and tuple(class_names) != segmenter.class_names:
        raise ValueError(
            f"class names {list(class_names)} are not the segmenter's {list(segmenter.class_names)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = saved_state(segmenter)
    save_file(on_host(state), folder / "model.safetensors")
    if ema is not None:
        whole = {n: ema.get(n, value) for n, value in state.items()}
        save_file(on_host(whole), folder / "ema.safetensors")
    description = {
        "format": FORMAT,
        "segmenter": segmenter.config.model_dump(mode="json"),
        "class_names": list(segmenter.class_names),
        "label_space": label_space,
        "step": step,
        "frozen": {
            "encoder": segmenter.config.encoder.name,
            "weights": segmenter.config.encoder.weights,
            "sha256": frozen_digest(segmenter),
        },
        "extra": dict(extra or {}),
    }
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    (folder / "checkpoint.json").write_text(text, encoding="utf-8")


def on_host(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU, as safetensors wants them."""
    return {n: v.detach().cpu().contiguous() for n, v in state.items()}


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `checkpoint.json`.

    Raises:
        FileNotFoundError: no checkpoint in this folder.
        ValueError: written by a newer version of this code.
    """
    path = folder / "checkpoint.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no checkpoint (no checkpoint.json); "
            "make one with: clouds --stage train_source"
        )
    description = json.loads(path.read_text(encoding="utf-8"))
    if description["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {description['format']}, this code reads up to {FORMAT}: update it"
        )
    return description


def load_segmenter(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    which: Literal["model", "ema"] = "model",
) -> Segmenter:
    """Rebuild a segmenter from its folder, in eval mode.

    Args:
        folder: written by `save_segmenter`.
        device: where to.
        which: the weights themselves or their moving average.

    Raises:
        FileNotFoundError: no checkpoint, or none of this kind.
        ValueError: tensors that do not fit, or other frozen weights than it was trained with.
    """
    description = describe_checkpoint(folder)
    path = folder / f"{which}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the folder holds {names_in(folder)}")
    config = SegmenterConfig.model_validate(description["segmenter"])
    segmenter = build_segmenter(config, class_names=description["class_names"])
    load_strictly(segmenter, load_file(path), origin=str(path))
    expected = description["frozen"]["sha256"]
    if frozen_digest(segmenter) != expected:
        raise ValueError(
            f"{path}: the frozen encoder {config.encoder.name!r} with weights "
            f"{config.encoder.weights!r} is not the one it was trained with (sha256 {expected})"
        )
    return segmenter.to(device).eval()


def load_strictly(
    segmenter: Segmenter, file: Mapping[str, torch.Tensor], *, origin: str
) -> KeyReport:
    """Load the saved part of a segmenter; refuse anything but a complete match.

    Raises:
        ValueError: with the full report, if anything is missing, unexpected or misshapen.
    """
    state = saved_state(segmenter)
    report = compare_keys(file, state)
    if not report.complete:
        raise ValueError(f"{origin} does not fit the segmenter: {report}")
    with torch.no_grad():
        for name, value in file.items():
            state[name].copy_(value)
    return report


def names_in(folder: Path) -> str:
    """The files of a folder, for messages."""
    return ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
