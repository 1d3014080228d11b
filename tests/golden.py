"""Hold the code against golden sets: numbers that the published implementations gave.

    python -m tests.golden ../shared/golden

One line per set: the largest absolute and relative difference, the tolerance, pass or fail. Exits
with 1 on a failure, on a set that no check knows, and where there is none. Sizes come from the
files. The sets are described in the folder's own README.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from models import convert, evaluators, masks
from models.config import EncoderConfig, LossConfig, TuningConfig
from models.decoder import Prediction, QueryDecoder
from models.heads import MaskHead
from models.inference import slide, windows
from models.losses import SetCriterion, pixel_loss
from models.matching import Targets, find_targets
from models.pixel_decoder import PixelDecoder
from models.points import PointDraws
from models.rein import ReinTokens, TokenCorrection
from models.segmenter import Segmenter, SegmenterOutput, resize
from models.text import ContextDecoder, score_map
from models.towers import build_encoder, build_open_clip, load_trunk

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest value of a tensor; integers are equal."""


@dataclass(frozen=True)
class Difference:
    """One of our tensors against the golden one."""

    name: str
    ours: torch.Tensor
    theirs: torch.Tensor

    def measure(self) -> tuple[float, float]:
        """Largest absolute difference, and the same over the largest golden value."""
        if self.ours.shape != self.theirs.shape:
            return float("inf"), float("inf")
        if self.theirs.numel() == 0:
            return 0.0, 0.0
        ours, theirs = self.ours.detach().double(), self.theirs.double()
        if not torch.equal(ours.isnan(), theirs.isnan()):
            return float("inf"), float("inf")
        difference = (ours - theirs).nan_to_num().abs().max().item()
        if not self.theirs.is_floating_point():
            return difference, float("inf") if difference else 0.0
        largest = theirs.nan_to_num().abs().max().item()
        return difference, difference / largest if largest else difference


class GoldenSet:
    """The tensors of a golden file, by key, and its sizes."""

    def __init__(self, path: Path):
        self.name = path.stem
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below a prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def series(self, pattern: str) -> list[torch.Tensor]:
        """The tensors `pattern` with 0, 1, 2, ... in place of `#`."""
        found = []
        while (key := pattern.replace("#", str(len(found)))) in self.tensors:
            found.append(self.tensors[key])
        return found


def load(module: nn.Module, state: dict[str, torch.Tensor], strange: list[str]) -> nn.Module:
    """Load translated weights strictly; every foreign name must have been known."""
    assert not strange, f"no rule for {strange[:5]}"
    module.load_state_dict(state, strict=True)
    return module


def clouds_head(golden: GoldenSet) -> Iterator[Difference]:
    """The mask decoder of CLOUDS on given features, padded and unpadded."""
    state, strange = convert.rename(
        generated_weights(golden) if "gen/seed" in golden.tensors else golden.part("state/"),
        convert.CLOUDS_DECODER,
        prefix="sem_seg_head.",
    )
    yield from generator_check(golden)
    c = golden.config
    width, classes = c["conv_dim"], c["num_classes"]
    pixel_decoder = PixelDecoder(
        c["channels"],
        width=width,
        heads=c["heads"],
        layers=c["enc_layers"],
        ffn=1024,
        points=4,
        groups=32,
    )
    query_decoder = QueryDecoder(
        nn.Linear(width, classes + 1),
        width=width,
        queries=c["queries"],
        layers=c["dec_layers"],
        heads=c["heads"],
        ffn=c["dec_ffn"],
    )
    head = load(MaskHead(pixel_decoder, query_decoder), state, strange).train()
    for case, (_, (image_size, step), out_size, _) in c["cases"].items():
        prefix = "" if case == "main" else f"{case}/"
        features = [golden[f"{prefix}in/res{n}"] for n in (2, 3, 4, 5)]
        pixels = pixel_decoder(features)
        predicted = head(features)
        padded = tuple(side + -side % step for side in image_size)
        output = SegmenterOutput(image_size=tuple(image_size), padded_size=padded, **predicted)
        yield Difference("mask_features", pixels.masks_BCHW, golden[f"{prefix}out/mask_features"])
        for index, level in enumerate(pixels.levels_BCHW):
            yield Difference("levels", level, golden[f"{prefix}out/multi_scale_{index}"])
        for prediction, key in zip(
            output.predictions,
            ["pred", *(f"aux_{index}" for index in range(c["dec_layers"]))],
            strict=True,
        ):
            logits, masks_BQHW = prediction
            yield Difference(f"{key} logits", logits, golden[f"{prefix}out/{key}_logits"])
            yield Difference(f"{key} masks", masks_BQHW, golden[f"{prefix}out/{key}_masks"])
        semantic = Segmenter.semantic(output, summed="pixel")
        yield Difference("semantic", semantic, golden[f"{prefix}out/semantic"])
        resized = resize(semantic, tuple(out_size))
        yield Difference("resized", resized, golden[f"{prefix}out/semantic_resized"])


def generated_weights(golden: GoldenSet) -> dict[str, torch.Tensor]:
    """Weights that a golden set defines by an integer formula, by their original names."""
    state = {}
    for index, (name, shape) in enumerate(generated_shapes(golden)):
        count = int(np.prod(shape)) if shape else 1
        offset, bound = golden["gen/offset_bound"][index].tolist()
        with np.errstate(over="ignore"):
            x = np.uint64(golden["gen/seed"].item()) + np.uint64(index) * np.uint64(2**40)
            x = (x + np.arange(count, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
        uniform = (x >> np.uint64(11)).astype(np.float64) / 2**53
        values = (offset + bound * (2 * uniform - 1)).astype(np.float32)
        state[name] = torch.from_numpy(values).reshape(shape)
    return state


def generated_shapes(golden: GoldenSet) -> list[tuple[str, list[int]]]:
    """(name, shape) of each generated tensor, in its order."""
    return [
        (key.partition("/")[2], shape.tolist())
        for key, shape in sorted(golden.part("gen/shape/").items())
    ]


def generator_check(golden: GoldenSet) -> Iterator[Difference]:
    """The first values of each generated tensor."""
    if "gen/first8" not in golden.tensors:
        return
    for value, first in zip(generated_weights(golden).values(), golden["gen/first8"], strict=True):
        flat = value.flatten()[:8]
        yield Difference("generator", F.pad(flat, (0, 8 - len(flat))), first)


def clouds_losses(golden: GoldenSet) -> Iterator[Difference]:
    """Matching, losses and gradients, with the recorded random points."""
    names = ["pred", *(f"aux_{index}" for index in range(golden.config["aux"]))]
    predictions = [
        Prediction(
            golden[f"in/{n}_logits"].requires_grad_(), golden[f"in/{n}_masks"].requires_grad_()
        )
        for n in names
    ]
    labels = torch.stack(golden.series("in/label_map_#"))
    batch, size = len(labels), tuple(labels.shape[1:])
    draws = recorded_draws(golden, predictions=len(names), batch=batch)
    config = LossConfig(points=golden.config["points"])
    criterion = SetCriterion(config, golden.config["k"])
    output = SegmenterOutput(
        image_size=size,
        padded_size=size,
        class_logits_BQK1=predictions[0].class_logits_BQK1,
        masks_BQHW=predictions[0].masks_BQHW,
        aux=tuple(predictions[1:]),
    )
    targets = find_targets(labels, golden.config["k"])
    queries_LT = criterion.match(predictions, labels, targets, draws)
    for name, queries_T in zip(names, queries_LT, strict=True):
        for image in range(batch):
            places = targets.of_image(image)
            order = queries_T[places].argsort()
            yield Difference(
                "match", queries_T[places][order], golden[f"out/match_{name}_{image}_query"]
            )
            yield Difference("match", order, golden[f"out/match_{name}_{image}_target"])
    draws = ordered_by_class(draws, targets, queries_LT)
    losses = criterion(output, labels, draws=draws)
    for name, value in losses.items():
        yield Difference(name, value, golden[f"out/{name}"])
    losses["total"].backward()
    for name, (logits, masks_BQHW) in zip(names, predictions, strict=True):
        yield Difference(f"grad {name}", logits.grad, golden[f"out/grad_{name}_logits"])
        yield Difference(f"grad {name}", masks_BQHW.grad, golden[f"out/grad_{name}_masks"])


def recorded_draws(golden: GoldenSet, *, predictions: int, batch: int) -> PointDraws:
    """The recorded random points: per prediction one draw per image, then candidates, then rest."""
    recorded = iter(value for _, value in sorted(golden.part("rand/").items()))
    matching, candidates, uniform = [[] for _ in range(batch)], [], []
    for _ in range(predictions):
        for points in matching:
            points.append(next(recorded)[0])
        candidates.append(next(recorded))
        uniform.append(next(recorded))
    return PointDraws(
        matching=[torch.stack(points) for points in matching],
        candidates=[torch.stack(candidates)],
        uniform=[torch.stack(uniform)],
    )


def ordered_by_class(draws: PointDraws, targets: Targets, queries_LT: torch.Tensor) -> PointDraws:
    """Recorded draws come by matched query inside an image; the criterion wants them by class."""
    keys = torch.tensor(targets.images_T) * 10**6 + queries_LT
    ranks_LT = keys.argsort(1).argsort(1)
    recorded = (draws.candidates[0], draws.uniform[0])
    candidates, uniform = (
        torch.stack([drawn[ranks] for drawn, ranks in zip(x, ranks_LT, strict=True)])
        for x in recorded
    )
    return PointDraws(draws.matching, [candidates], [uniform])


def clip_trunk(golden: GoldenSet) -> Iterator[Difference]:
    """The frozen image encoder of CLOUDS, from pictures of two sizes."""
    c = golden.config
    if any("trunk.stem" in key for key in golden.tensors):
        architecture = {
            "timm_model_name": "convnext_tiny",
            "timm_options": {"depths": c["depths"], "dims": c["dims"]},
        }
    else:
        architecture = {"layers": c["layers"], "width": c["width"], "image_size": 64}
    config = EncoderConfig(architecture=architecture)
    encoder = build_open_clip(config, TuningConfig(), load=False)
    prefix = "visual.trunk." if "timm_model_name" in architecture else "visual."
    load_trunk(encoder.trunk, golden.part("state/backbone.clip_model."), prefix)
    segmenter = Segmenter(encoder, nn.Identity(), class_names=["any"]).eval()
    with torch.no_grad():
        padded, _ = segmenter.prepare(golden.series("in/image_#"))
        yield Difference("padded", padded, golden["out/padded"])
        stem = padded
        for module in encoder.stem():
            if not isinstance(module, nn.AvgPool2d):
                stem = module(stem)
        yield Difference("stem", stem, golden["out/stem"])
        for index, feature in enumerate(encoder(padded)):
            yield Difference(f"res{index + 2}", feature, golden[f"out/res{index + 2}"])


def sam_refine(golden: GoldenSet) -> Iterator[Difference]:
    """The refinement steps, with stored masks in SAM's place."""
    void = (19, 255)
    num_points = golden["in/num_points"].item()
    drawn = iter(range(10**6))
    for image, label_map in enumerate(golden.series("in/label_map_#")):
        found = masks.find_components(
            label_map.numpy(), min_area_px=golden["in/size_threshold"].item(), void=void
        )
        raw = masks.classes_of(label_map.numpy(), void=void)
        labels = [component.label for component in found]
        counts = [[label, labels.count(label)] for label in raw]
        yield Difference("raw", torch.tensor(raw), golden[f"out/raw_{image}_labels"])
        yield Difference(
            "classes",
            torch.tensor(labels, dtype=torch.int64),
            golden[f"out/component_{image}_class"],
        )
        yield Difference(
            "counts", torch.tensor(counts), golden[f"out/component_{image}_count_per_class"]
        )
        if not found:
            refined = masks.refined_label_map(label_map.numpy(), found, torch.empty(0), void=19)
            yield from class_masks(golden, image, refined, void)
            continue
        canvas = np.zeros(label_map.shape, dtype=np.uint8)
        for number, component in enumerate(found, start=1):
            component.paint(canvas, number)
        yield Difference("map", torch.from_numpy(canvas), golden[f"out/component_{image}_map"])
        points = []
        for component in found:
            key = f"rand/choice_{next(drawn):03d}"
            pixels = torch.tensor(component.area_px)
            yield Difference("pixel count", pixels, golden[f"{key}_n"])
            points.append(masks.pick_points(component, golden[key].numpy()))
        points = np.stack(points)
        assert points.shape[1] == num_points
        yield Difference("points", torch.from_numpy(points), golden[f"out/points_{image}"])
        scaled = masks.scale_points(points, tuple(label_map.shape))
        yield Difference("scaled", torch.from_numpy(scaled), golden[f"out/points_sam1024_{image}"])
        best, index = masks.best_masks(
            golden[f"in/sam_{image}_masks"].bool(), golden[f"in/sam_{image}_iou"]
        )
        yield Difference("best", index, golden[f"out/best_index_{image}"])
        apart = masks.remove_overlaps(best)
        numbered = masks.label_map_of(apart, range(1, len(apart) + 1), void=0)
        yield Difference("no overlap", numbered, golden[f"out/no_overlap_{image}_map"])
        refined = masks.refined_label_map(label_map.numpy(), found, best, void=19)
        yield Difference("refined", torch.from_numpy(refined), golden[f"out/refined_{image}_map"])
        yield from class_masks(golden, image, refined, void)


def class_masks(
    golden: GoldenSet, image: int, refined: np.ndarray, void: tuple[int, ...]
) -> Iterator[Difference]:
    """A refined label map against the golden classes and class masks."""
    classes = torch.tensor(masks.classes_of(refined, void=void))
    yield Difference("classes", classes, golden[f"out/refined_{image}_labels"])
    binary = (torch.from_numpy(refined) == classes[:, None, None]).to(torch.uint8)
    yield Difference("masks", binary, golden[f"out/refined_{image}_masks"])


def rein(golden: GoldenSet) -> Iterator[Difference]:
    """Rein's token module in its variants."""
    c = golden.config
    variants = {
        "full": {"rank": None},
        "lora": {"rank": c["r"]},
        "nosoftmax": {"rank": c["r"], "softmax": False},
        "zeromlp": {"rank": c["r"], "scale": None},
        "nolink": {"rank": None, "query_width": None},
    }
    features = golden.series("in/feats_#")
    for name, options in variants.items():
        tokens = ReinTokens(
            [c["L"]], [c["c"]], **({"tokens": c["m"], "query_width": c["qd"]} | options)
        )
        stored = golden.part(f"state/{name}/")
        if "query_width" in options:  # stored with the link's layers, which it never uses
            stored = {k: v for k, v in stored.items() if not k.startswith(("transform", "merge"))}
        state, strange = convert.rename(stored, convert.REIN_TOKENS, new_prefix="stages.0.")
        load(tokens, state, strange)
        correct, correct_patches = tokens.after_block(1), tokens.after_block(0)
        x = features[0]
        for block, given in enumerate(features):
            out = correct(given, 0, block)
            yield Difference(f"{name} layer", out, golden[f"out/{name}/layer_{block}"])
            out = correct_patches(given[:, 1:], 0, block)
            yield Difference(f"{name} no cls", out, golden[f"out/{name}/layer_{block}_nocls"])
            x = correct(x, 0, block)
        first = correct(features[0], 0, 0).transpose(0, 1)
        yield Difference(f"{name} nbc", first, golden[f"out/{name}/layer_0_nbc"])
        yield Difference(f"{name} sequence", x, golden[f"out/{name}/sequence"])
        stage: TokenCorrection = tokens.stages[0]
        yield Difference(f"{name} tokens", stage.all_tokens(), golden[f"out/{name}/tokens"])
        if stage.linked:
            yield Difference(f"{name} queries", tokens.queries(), golden[f"out/{name}/queries"])


def rein_convnext(golden: GoldenSet) -> Iterator[Difference]:
    """Rein on a ConvNeXt: one module per stage, after every block."""
    c = golden.config
    config = EncoderConfig(
        family="timm",
        name="convnext_tiny",
        architecture={"depths": c["depths"], "dims": c["channels"]},
        output_norm=True,
    )
    for name, rank in (("full", None), ("lora", c["r"])):
        encoder = build_encoder(config, TuningConfig()).eval()
        tokens = ReinTokens(
            encoder.blocks, encoder.widths, tokens=c["m"], rank=rank, query_width=c["qd"]
        )
        whole = golden.part(f"state/{name}/")
        trunk = {k: v for k, v in whole.items() if not k.startswith("reins.")}
        load(encoder, *convert.rename(trunk, convert.MMPRETRAIN_CONVNEXT))
        state, strange = {}, []
        for stage in range(len(c["depths"])):
            more, unknown = convert.rename(
                whole, convert.REIN_TOKENS, prefix=f"reins.{stage}.", new_prefix=f"stages.{stage}."
            )
            state |= more
            strange += unknown
        load(tokens, state, strange)
        features = encoder(golden["in/image"], tokens.after_block(encoder.prefix))
        for index, feature in enumerate(features):
            yield Difference(f"{name} stage", feature, golden[f"{name}/out/feat_{index}"])
        yield Difference(f"{name} queries", tokens.queries(), golden[f"{name}/out/queries"])


def denseclip_score(golden: GoldenSet) -> Iterator[Difference]:
    """Context decoder, score map and pixel-text loss of DenseCLIP."""
    c = golden.config
    decoder = ContextDecoder(c["c"], width=c["width"], heads=c["heads"], layers=c["layers"]).eval()
    decoder.load_state_dict(golden.part("state/context_decoder."), strict=True)
    visual, texts = golden["in/visual"], golden["in/text"].expand(c["b"], -1, -1)
    tokens = torch.cat([golden["in/global"][:, None], visual.flatten(2).transpose(1, 2)], 1)
    corrected = texts + golden["in/gamma"] * decoder(texts, tokens)
    for name, used in (("plain", texts), ("context", corrected)):
        out = f"out/{name}/"
        yield Difference(f"{name} text", used, golden[f"{out}text"])
        scores = score_map(visual, used)
        yield Difference(f"{name} map", scores, golden[f"{out}score_map"])
        joined = torch.cat([golden["in/level"], scores], 1)
        yield Difference(f"{name} concat", joined, golden[f"{out}concat"])
        labels = golden["in/labels"]
        loss = pixel_loss(scores / 0.07, labels, count_ignored=True)
        yield Difference(f"{name} loss", loss, golden[f"{out}aux_loss"])
        loss = pixel_loss(scores / 0.07, labels)
        yield Difference(f"{name} valid loss", loss, golden[f"{out}aux_loss_valid_mean"])


def evaluation(golden: GoldenSet) -> Iterator[Difference]:
    """Confusion matrices and IoU of four evaluators."""
    classes = 19
    truth = golden["in/gt"]
    for kind in ("plain", "void"):
        predictions, out = golden[f"in/pred_{kind}"], f"out/{kind}/"
        confusion = evaluators.confusion_matrix(predictions, truth, classes)
        boundary = evaluators.boundary_confusion(predictions, truth, classes, eight_bits=True)
        ids = evaluators.cityscapes_confusion(confusion)
        yield Difference("ids", ids, golden[f"{out}cityscapes/confusion_ids"])
        categories = list(evaluators.category_iou(confusion).values())
        key = f"{out}cityscapes/category_"
        yield Difference("categories", torch.tensor(categories), golden[f"{key}iou"])
        mean = torch.tensor(categories).nanmean()
        yield Difference("category mean", mean, golden[f"{key}miou"])
        for rule in ("cityscapes", "mmseg", "detectron2", "clouds"):
            scores, key = evaluators.iou_scores(confusion, rule), f"{out}{rule}/"
            yield Difference(f"{rule} iou", scores.class_iou_K, golden[f"{key}class_iou"])
            yield Difference(f"{rule} mean", torch.tensor(scores.miou), golden[f"{key}miou"])
            if rule == "cityscapes":
                continue
            yield Difference(f"{rule} acc", scores.class_accuracy_K, golden[f"{key}class_acc"])
            pixels = torch.tensor(scores.pixel_accuracy)
            if rule == "mmseg":
                yield Difference("mmseg pixels", pixels, golden[f"{key}aacc"])
                yield from mmseg_report(golden, key, confusion, scores)
                continue
            yield Difference(f"{rule} pixels", pixels, golden[f"{key}pacc"])
            mean = torch.tensor(scores.mean_accuracy)
            yield Difference(f"{rule} mean acc", mean, golden[f"{key}macc"])
            weighted = torch.tensor(scores.frequency_iou)
            yield Difference(f"{rule} weighted", weighted, golden[f"{key}fwiou"])
            yield Difference(rule, confusion.T, golden[f"{key}confusion_pred_gt"])
            yield Difference(rule, boundary.T, golden[f"{key}boundary_confusion_pred_gt"])
            iou = evaluators.boundary_iou(boundary)
            yield Difference(f"{rule} boundary", iou, golden[f"{key}boundary_iou"])


def mmseg_report(
    golden: GoldenSet, key: str, confusion: torch.Tensor, scores: evaluators.IouScores
) -> Iterator[Difference]:
    """mmseg's areas and the percentages it prints with two decimals."""
    right, truth = confusion.diagonal()[:-1], confusion[:-1].sum(1)
    predicted = confusion[:-1, :-1].sum(0)
    for name, area in (
        ("intersect", right),
        ("gt", truth),
        ("pred", predicted),
        ("union", truth + predicted - right),
    ):
        yield Difference(f"area {name}", area.double(), golden[f"{key}area_{name}"])
    for name, value in (
        ("aacc", scores.pixel_accuracy),
        ("miou", scores.miou),
        ("macc", scores.mean_accuracy),
    ):
        percent = torch.tensor(round(100 * value, 2))
        yield Difference(f"{name} printed", percent, golden[f"{key}{name}_reported_percent"])


def inference(golden: GoldenSet) -> Iterator[Difference]:
    """Sliding windows and whole images, as mmsegmentation runs them."""

    def network(images: torch.Tensor) -> torch.Tensor:
        x = images
        for index, step in ((1, 2), (2, 2), (3, 1)):
            weight, bias = golden[f"state/conv{index}.weight"], golden[f"state/conv{index}.bias"]
            x = F.relu(F.conv2d(x, weight, bias, stride=step, padding=1))
        x = F.conv2d(x, golden["state/conv4.weight"], golden["state/conv4.bias"])
        return resize(x, tuple(images.shape[-2:]))

    window, stride = (tuple(golden[f"in/{key}"].tolist()) for key in ("crop", "stride"))
    size = tuple(golden["in/gt_size"].tolist())
    for prefix in ("", "small/"):
        image = golden[f"{prefix}in/image"]
        places = torch.tensor(windows(tuple(image.shape[-2:]), window, stride))
        yield Difference("windows", places, golden[f"{prefix}out/windows"])
        cases = {"slide": slide(network, image, window=window, stride=stride)}
        if not prefix:
            cases["whole"] = network(image)
        for name, logits in cases.items():
            key = f"{prefix}out/{name}_"
            yield Difference(f"{name} logits", logits, golden[f"{key}logits"])
            resized = resize(logits, size)
            yield Difference(f"{name} resized", resized[0], golden[f"{key}logits_resized"])
            label_map = resized.argmax(1).to(torch.uint8)
            yield Difference(f"{name} labels", label_map, golden[f"{key}pred"])


CHECKS: dict[str, Callable[[GoldenSet], Iterator[Difference]]] = {
    "clouds_head": clouds_head,
    "clouds_head_full": clouds_head,
    "clouds_losses": clouds_losses,
    "clip_trunk_convnext": clip_trunk,
    "clip_trunk_resnet": clip_trunk,
    "sam_refine": sam_refine,
    "rein": rein,
    "rein_convnext": rein_convnext,
    "denseclip_score": denseclip_score,
    "evaluation": evaluation,
    "inference": inference,
}


@dataclass(frozen=True)
class Verdict:
    """How a golden set went."""

    name: str
    passed: bool
    compared: int
    """Tensors compared."""
    absolute: float
    """Largest absolute difference."""
    relative: float
    """Largest difference relative to its tensor's largest value."""
    worst: str
    """The tensor with the largest relative difference, or why there is none."""

    def __str__(self) -> str:
        return (
            f"{self.name:<20} {'pass' if self.passed else 'FAIL'}  {self.compared:4d} tensors  "
            f"abs {self.absolute:.1e}  rel {self.relative:.1e}  tol {TOLERANCE:.0e}  {self.worst}"
        )


def check(path: Path) -> Verdict:
    """Hold the code against one golden file."""
    if path.stem not in CHECKS:
        known = ", ".join(CHECKS)
        return Verdict(path.stem, False, 0, 0.0, 0.0, f"unknown set; known: {known}")
    try:
        found = [(*d.measure(), d.name) for d in CHECKS[path.stem](GoldenSet(path))]
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        return Verdict(path.stem, False, 0, 0.0, 0.0, f"{type(error).__name__}: {error}")
    absolute = max(a for a, _, _ in found)
    relative, worst = max((r, name) for _, r, name in found)
    return Verdict(path.stem, relative <= TOLERANCE, len(found), absolute, relative, worst)


def main(arguments: list[str] | None = None) -> int:
    """Check every golden set of a folder; 0 if all pass."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with *.safetensors golden sets")
    folder = parser.parse_args(arguments).folder
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        print(f"no *.safetensors in {folder}", file=sys.stderr)
        return 1
    failed = 0
    for path in paths:
        verdict = check(path)
        print(verdict, flush=True)
        failed += not verdict.passed
    print(f"{len(paths) - failed} of {len(paths)} sets pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
