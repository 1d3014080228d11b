"""A picture of what encoders see: dense features by class and domain, laid out by t-SNE.

    clouds features --model frozen=KEY --model tuned=KEY --out features

The same pixels are taken for every model, so that panels can be compared. Beside the picture stand
silhouettes of the features themselves (not of the layout): by class they should be high, by domain
low. Needs scikit-learn (the extra `study`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.checkpoints import load_segmenter
from models.segmenter import Segmenter
from stages.contracts import Progress, Summary
from stages.devices import device_for
from stages.feature_panels import Panel, draw_png, draw_svg
from stages.labels import IGNORE, LabelSpace, read_labelspace
from stages.readers import Sample, load_index
from stages.shards import item_seed, write_json
from stages.use_config import FeatureMapConfig

COMPONENTS = 50
"""Principal components that t-SNE works on (van der Maaten and Hinton 2008, section 4.2: 30)."""


@dataclass(frozen=True, kw_only=True)
class PixelPlace:
    """One labelled pixel whose feature is drawn."""

    sample: Sample
    train_id: int
    y_px: int
    x_px: int


def run(
    config: FeatureMapConfig,
    *,
    models: Mapping[str, Path],
    prepared: Path,
    out: Path,
    progress: Progress,
    device: str = "auto",
) -> Summary:
    """Draw the features of all labelled sets of a `prepare` artifact; see `draw_feature_map`."""
    parts = [prepared / name for name in ("sources", "targets")]
    result = draw_feature_map(
        out,
        models=models,
        parts=[part for part in parts if (part / "roots.json").is_file()],
        labelspace=prepared / "labelspace",
        progress=progress,
        config=config,
        device=device,
    )
    told = [
        f"{name}: by class {_number(entry['silhouette_class'])}, by domain "
        f"{_number(entry['silhouette_domain'])}"
        for name, entry in result["models"].items()
    ]
    points, domains = len(result["points"]), len(result["domains"])
    return Summary(text=f"{points} points of {domains} data sets; silhouettes of {'; '.join(told)}")


def draw_feature_map(
    out: Path,
    *,
    models: Mapping[str, Path],
    parts: Sequence[Path],
    labelspace: Path,
    progress: Progress,
    config: FeatureMapConfig | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Draw the features of labelled pixels, one panel per model.

    Args:
        out: folder for `features.svg`, `features.png` and `features.json`.
        models: name of the panel -> folder of a checkpoint; all of the same classes.
        parts: parts of a `prepare` artifact with labels (`sources`, `targets`).
        labelspace: part `labelspace` of the same.
        progress: told every picture of every model.
        config: which pixels, and how they are laid out.
        device: auto, cpu, cuda, cuda:N.

    Returns:
        What `features.json` holds: `classes`, `domains`, `points` (class and domain by number,
        sample, place) and per model `layout` ([x, y] of each point), `silhouette_class` and
        `silhouette_domain` (-1..1; None where there is one class or domain only).

    Raises:
        ValueError: scikit-learn is missing, there are too few labelled pixels, or a model tells
            other classes apart.
    """
    _check_packages()
    config = config or FeatureMapConfig()
    space = read_labelspace(labelspace)
    samples = [sample for part in parts for sample in load_index(part) if sample.label is not None]
    places = pick_places(samples, space, config)
    if len(places) < 8:
        raise ValueError(
            f"{len(places)} labelled pixels in {', '.join(str(part) for part in parts)} are too "
            "few for a picture of features."
        )
    domains = list(dict.fromkeys(place.sample.dataset for place in places))
    classes = np.array([place.train_id for place in places])
    of_domain = np.array([domains.index(place.sample.dataset) for place in places])
    where = device_for(device, precision="fp32")
    progress.start(len(models) * len({place.sample.id for place in places}), "pictures")
    found: dict[str, Any] = {}
    for name, folder in models.items():
        segmenter = load_segmenter(folder, device=where.device, which=config.weights)
        if segmenter.class_names != space.names:
            raise ValueError(
                f"{folder} tells apart {', '.join(segmenter.class_names)}; label space "
                f"{space.name!r} has {', '.join(space.names)}."
            )
        features_NC = features_at(segmenter, places, config.level, progress)
        found[name] = {
            "layout": layout(features_NC, config).round(3).tolist(),
            "silhouette_class": silhouette(features_NC, classes),
            "silhouette_domain": silhouette(features_NC, of_domain),
        }
    result = {
        "settings": config.model_dump(mode="json"),
        "classes": [{"id": c.id, "name": c.name, "colour": list(c.colour)} for c in space.classes],
        "domains": domains,
        "points": [
            {"class": int(k), "domain": int(d), "id": p.sample.id, "y_px": p.y_px, "x_px": p.x_px}
            for p, k, d in zip(places, classes, of_domain, strict=True)
        ],
        "models": found,
    }
    _draw(out, result)
    return result


def pick_places(
    samples: Sequence[Sample], space: LabelSpace, config: FeatureMapConfig
) -> list[PixelPlace]:
    """Labelled pixels, at most `points` per class and data set, spread over the pictures.

    Pixels next to another class are not taken: one feature would cover both.
    """
    found = []
    for dataset in dict.fromkeys(sample.dataset for sample in samples):
        group = [sample for sample in samples if sample.dataset == dataset]
        count = min(config.pictures, len(group))
        chosen = [group[number * len(group) // count] for number in range(count)]
        labels = [(sample, inside(sample.read_label(), config.level // 2)) for sample in chosen]
        for train_id in range(space.num_classes):
            having = [entry for entry in labels if (entry[1] == train_id).any()]
            for number, (sample, label_HW) in enumerate(having):
                share = config.points * (number + 1) // len(having)
                share -= config.points * number // len(having)
                rows, columns = np.nonzero(label_HW == train_id)
                generator = np.random.default_rng(item_seed(config.seed, sample.id, train_id))
                picked = generator.permutation(len(rows))[:share]
                found += [
                    PixelPlace(
                        sample=sample, train_id=train_id, y_px=int(rows[i]), x_px=int(columns[i])
                    )
                    for i in picked
                ]
    return found


def inside(label_HW: np.ndarray, reach_px: int) -> np.ndarray:
    """The label map with 255 where another label is within `reach_px` to a side."""
    result = label_HW.copy()
    for axis in (0, 1):
        step = min(reach_px, label_HW.shape[axis] - 1)
        for shift in (step, -step) if step else ():
            moved = np.roll(label_HW, shift, axis)
            edge = [slice(None), slice(None)]
            edge[axis] = slice(None, shift) if shift > 0 else slice(shift, None)
            moved[tuple(edge)] = label_HW[tuple(edge)]  # beyond the border is no other class
            result[moved != label_HW] = IGNORE
    return result


@torch.inference_mode()
def features_at(
    segmenter: Segmenter, places: Sequence[PixelPlace], level: int, progress: Progress
) -> np.ndarray:
    """The encoder's features at pixels, each of length 1: float32 [N, C].

    Args:
        segmenter: in eval mode.
        places: pixels; those of one picture share a forward pass.
        level: stride of the map that is read; of a plain transformer its last map.
        progress: told every picture.
    """
    rows: dict[int, np.ndarray] = {}
    device = segmenter.encoder.mean.device
    for sample in {place.sample.id: place.sample for place in places}.values():
        image_3HW = torch.from_numpy(sample.read_image()).permute(2, 0, 1).to(device)
        padded_B3HW, _ = segmenter.prepare(image_3HW[None])
        maps, _ = segmenter.encode(padded_B3HW)
        map_CHW = (maps[-1] if segmenter.neck is not None else maps[level.bit_length() - 3])[0]
        stride_y = padded_B3HW.shape[2] / map_CHW.shape[1]
        stride_x = padded_B3HW.shape[3] / map_CHW.shape[2]
        for number, place in enumerate(places):
            if place.sample.id == sample.id:
                y, x = int(place.y_px / stride_y), int(place.x_px / stride_x)
                rows[number] = map_CHW[:, y, x].float().cpu().numpy()
        progress.advance()
    features_NC = np.stack([rows[number] for number in range(len(places))])
    return features_NC / np.linalg.norm(features_NC, axis=1, keepdims=True).clip(1e-12)


def layout(features_NC: np.ndarray, config: FeatureMapConfig) -> np.ndarray:
    """Places of features on a plane by t-SNE of their first principal components, [N, 2]."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count, channels = features_NC.shape
    components = min(COMPONENTS, count - 1, channels)
    reduced = PCA(components, random_state=config.seed).fit_transform(features_NC)
    perplexity = min(config.perplexity, (count - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=config.seed)
    return tsne.fit_transform(reduced.astype(np.float32))


def silhouette(features_NC: np.ndarray, groups_N: np.ndarray) -> float | None:
    """Mean silhouette by cosine distance (Rousseeuw 1987); None of fewer than two groups."""
    from sklearn.metrics import silhouette_score

    if not 2 <= len(np.unique(groups_N)) < len(groups_N):
        return None
    return round(float(silhouette_score(features_NC, groups_N, metric="cosine")), 4)


def _check_packages() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "t-SNE needs scikit-learn: pip install scikit-learn (this package's extra `study`)."
        ) from error


def _draw(out: Path, result: dict[str, Any]) -> None:
    """Write the picture in both forms, then the numbers."""
    present = {point["class"] for point in result["points"]}
    panels = [
        Panel(
            title=name,
            note=f"silhouette by class {_number(entry['silhouette_class'])}, by domain "
            f"{_number(entry['silhouette_domain'])}",
            layout=np.array(entry["layout"]),
        )
        for name, entry in result["models"].items()
    ]
    options = {
        "classes": [
            (entry["name"], tuple(entry["colour"]))
            for entry in result["classes"]
            if entry["id"] in present
        ],
        "domains": result["domains"],
        "colours": [tuple(result["classes"][p["class"]]["colour"]) for p in result["points"]],
        "shapes": [point["domain"] for point in result["points"]],
    }
    out.mkdir(parents=True, exist_ok=True)
    draw_svg(out / "features.svg", panels, **options)
    draw_png(out / "features.png", panels, **options)
    write_json(out / "features.json", result)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
