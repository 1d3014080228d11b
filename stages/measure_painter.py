"""Measure the miniature's painter: what a segmenter finds in pictures painted for captions.

python flows/miniature.py --stage measure_painter
"""

# N pictures, K classes, B H W batch, height and width, D channels of a tower's features

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.build import build_segmenter
from models.miniature.captions import visible_labels
from models.miniature.materials import IGNORE_ID, train_id_table
from models.miniature.renderer import Picture, render
from models.painter import Painter, load_painter
from models.segmenter import Segmenter
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.labels import load_labelspace
from stages.pretrain_config import MeasurePainterConfig
from stages.probes import learn, probe_config
from stages.shards import item_seed, write_json

FOUND_SHARE = 0.004
"""Share of a picture's pixels from which a class counts as found."""
LEAST_CAPTIONS = 20
"""Captions that name a class, and that do not, from which its rates count in the mean: hardly any
caption leaves out the sky or the road, and a rate of one or two pictures is noise."""
JUDGED_AT_ONCE = 32


def run(config: StageConfig, *, out: Path, progress: Progress, painter: Path) -> Summary:
    """Measure, and leave `gates.json`: figures, and whether the gate is passed.

    Args:
        config: section `measure_painter`.
        out: where `gates.json` goes.
        progress: told each part.
        painter: folder of the painter.
    """
    section, seed = config.measure_painter, config.seed
    out.mkdir(parents=True, exist_ok=True)
    progress.start(3, "parts")
    # 1. A judge that has seen many looks and their true labels.
    judge = _judge(section, seed)
    progress.advance()

    # 2. The same captions three times: as rendered, as painted, and painted for another caption.
    pictures = [
        render("web", seed=item_seed(seed, "judge painter", index))
        for index in range(section.num_prompts)
    ]
    loaded = load_painter(str(painter))
    painted = _paint(loaded, pictures, section, seed)
    progress.advance()

    # 3. Figures.
    gates = judge_pictures(judge, pictures, painted, section, seed)
    gates["psnr_db"] = round(autoencoder_psnr(loaded, pictures), 2)
    gates["passed"] = bool(
        gates["informedness"]["painted"] >= section.share * gates["informedness"]["rendered"]
        and gates["variety"]["painted"] >= section.variety * gates["variety"]["rendered"]
        and gates["psnr_db"] >= section.psnr
    )
    write_json(out / "gates.json", {"painter": gates})
    progress.advance()
    found = ", ".join(f"{name} {value:.2f}" for name, value in gates["informedness"].items())
    return Summary(
        text=f"painter {'passed' if gates['passed'] else 'NOT passed'}; informedness {found}",
        numbers={
            "informedness": gates["informedness"]["painted"],
            "variety": gates["variety"]["painted"],
            "psnr_db": gates["psnr_db"],
        },
    )


def judge_pictures(
    judge: Segmenter,
    pictures: list[Picture],
    painted: np.ndarray,
    config: MeasurePainterConfig,
    seed: int,
    *,
    least_captions: int = LEAST_CAPTIONS,
) -> dict[str, Any]:
    """How well painted pictures show what their captions name, and how much they differ.

    Args:
        judge: segmenter with the miniature's classes.
        pictures: rendered pictures whose captions were painted.
        painted: uint8 [N, H, W, 3], one for each.
        config: how many.
        seed: of the shuffling.
        least_captions: with and without a class, from which it counts in the mean.

    Raises:
        ValueError: too few pictures for any class to count.
    """
    names = load_labelspace("miniature").names
    rendered = np.stack([picture.image_HW3 for picture in pictures])
    named_NK = named_classes(pictures, len(names))
    counted_K = np.minimum(named_NK.sum(0), (~named_NK).sum(0)) >= least_captions
    if not counted_K.any():
        raise ValueError(
            f"no class is named by {least_captions} of {len(pictures)} captions and left out by as "
            "many: raise measure_painter.num_prompts."
        )
    order = _shuffled(len(pictures), seed)
    found, features = {}, {}
    for case, images in (("rendered", rendered), ("painted", painted)):
        found[case], features[case] = _look(judge, images)
    rates = {
        "rendered": class_rates(named_NK, found["rendered"]),
        "painted": class_rates(named_NK, found["painted"]),
        "shuffled": class_rates(named_NK[order], found["painted"]),
    }
    times = [picture.attributes.time in ("night", "sodium", "dusk") for picture in pictures]
    return {
        "classes": {
            name: {
                case: {key: _rounded(rates[case][key][k]) for key in rates[case]} for case in rates
            }
            for k, name in enumerate(names)
        },
        "informedness": {
            case: _rounded((rate["recall"] - rate["false_alarms"])[counted_K].mean())
            for case, rate in rates.items()
        },
        "counted_classes": [
            name for name, counted in zip(names, counted_K, strict=True) if counted
        ],
        "variety": {case: _rounded(_mean_distance(features[case])) for case in features},
        "dark_minus_bright": {
            case: _rounded(_contrast(images, np.array(times)))
            for case, images in (("rendered", rendered), ("painted", painted))
        },
        "colour": {
            case: {
                "mean": [round(float(value), 1) for value in images.mean((0, 1, 2))],
                "std": [round(float(value), 1) for value in images.std((0, 1, 2))],
            }
            for case, images in (("rendered", rendered), ("painted", painted))
        },
        "num_prompts": len(pictures),
        "paint_steps": config.paint_steps,
        "guidance": config.guidance,
    }


def named_classes(pictures: list[Picture], num_classes: int) -> np.ndarray:
    """bool [N, K]: which classes each picture's caption names."""
    named_NK = np.zeros((len(pictures), num_classes), dtype=bool)
    table = train_id_table()
    for row, picture in zip(named_NK, pictures, strict=True):
        classes = table[visible_labels(picture.label_ids_HW)]
        row[classes[classes != IGNORE_ID]] = True
    return named_NK


def class_rates(named_NK: np.ndarray, found_NK: np.ndarray) -> dict[str, np.ndarray]:
    """Per class: precision, recall, and false alarms (found where it was not named).

    Rates without any case to count are NaN.
    """
    both_K = (named_NK & found_NK).sum(0)
    with np.errstate(invalid="ignore"):
        return {
            "precision": both_K / found_NK.sum(0),
            "recall": both_K / named_NK.sum(0),
            "false_alarms": (found_NK & ~named_NK).sum(0) / (~named_NK).sum(0),
        }


@torch.inference_mode()
def autoencoder_psnr(painter: Painter, pictures: list[Picture]) -> float:
    """Mean PSNR in dB of pictures that went through the autoencoder and back."""
    autoencoder = painter.pipeline.vae
    values = []
    for start in range(0, len(pictures), JUDGED_AT_ONCE):
        images = np.stack([p.image_HW3 for p in pictures[start : start + JUDGED_AT_ONCE]])
        images_B3HW = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        back_B3HW = autoencoder.decode(autoencoder.encode(images_B3HW).latents).sample.clamp(-1, 1)
        error_B = ((back_B3HW - images_B3HW) / 2).square().mean((1, 2, 3))
        values += (-10 * error_B.log10()).tolist()
    return float(np.mean(values))


def _judge(config: MeasurePainterConfig, seed: int) -> Segmenter:
    train = [
        render("web", seed=item_seed(seed, "teach painter's judge", index))
        for index in range(config.num_train)
    ]
    names = load_labelspace("miniature").names
    segmenter = build_segmenter(
        probe_config(config.clip, weights=True, trained=False), class_names=names
    )
    learn(segmenter, train, config, seed)
    return segmenter.eval()


def _paint(
    painter: Painter, pictures: list[Picture], config: MeasurePainterConfig, seed: int
) -> np.ndarray:
    painted: list[np.ndarray] = []
    for start in range(0, len(pictures), config.paint_batch_size):
        batch = pictures[start : start + config.paint_batch_size]
        painted += painter.paint(
            [picture.caption for picture in batch],
            seeds=[item_seed(seed, "painted", start + i) for i in range(len(batch))],
            height=batch[0].image_HW3.shape[0],
            width=batch[0].image_HW3.shape[1],
            steps=config.paint_steps,
            guidance=config.guidance,
        )
    return np.stack(painted)


@torch.inference_mode()
def _look(judge: Segmenter, images_NHW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [N, K] classes found, and the tower's mean features [N, D], of length one."""
    found, features = [], []
    for start in range(0, len(images_NHW3), JUDGED_AT_ONCE):
        images = torch.from_numpy(images_NHW3[start : start + JUDGED_AT_ONCE]).permute(0, 3, 1, 2)
        scores_BKHW = judge.semantic(judge(images), size=tuple(images.shape[-2:]))
        classes_BHW = scores_BKHW.argmax(1)
        shares = torch.nn.functional.one_hot(classes_BHW, judge.num_classes).float().mean((1, 2))
        found.append((shares >= FOUND_SHARE).numpy())
        padded, _ = judge.prepare(images)
        pooled_BD = judge.encoder(padded)[-1].float().mean((2, 3))
        features.append(torch.nn.functional.normalize(pooled_BD, dim=1).numpy())
    return np.concatenate(found), np.concatenate(features)


def _shuffled(count: int, seed: int) -> np.ndarray:
    """An order in which no picture keeps its own caption."""
    rng = random.Random(item_seed(seed, "shuffled captions"))
    return np.roll(np.arange(count), rng.randrange(1, count))


def _mean_distance(features_ND: np.ndarray) -> float:
    """Mean cosine distance of all pairs."""
    count = len(features_ND)
    cosines = features_ND @ features_ND.T
    return float(1 - (cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def _contrast(images_NHW3: np.ndarray, dark_N: np.ndarray) -> float:
    """Mean brightness of pictures of dark hours minus that of the others, 0..255."""
    light_N = images_NHW3.mean((1, 2, 3))
    if dark_N.all() or not dark_N.any():
        return float("nan")
    return float(light_N[dark_N].mean() - light_N[~dark_N].mean())


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
