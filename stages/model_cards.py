"""Model cards of the miniature's networks: what was done, how good it is, and the files' digests.

A card is `README.md` beside the weights. Its figures come from manifests and from `gates.json`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.shards import file_digest

CARD_NAME = "README.md"

_DIGEST_LINE = re.compile(r"^\| `([^`]+)` \| (\d+) \| `([0-9a-f]{64})` \|$", re.MULTILINE)

_TITLES = {
    "clip": "Miniature CLIP",
    "sam": "Miniature SAM",
    "writer": "Miniature writer",
    "painter": "Miniature painter",
}
_CARD_SUFFIXES = (".json", ".jinja", ".safetensors")
"""Files whose digests a card states."""

_LESSONS = ("pictures", "sentences")
"""What a network learned from, as its summary counts it."""

_ABOUT = {
    "clip": """A small CLIP in open_clip's own classes (`CLIP`, `ModifiedResNet`): the code
that loads it is the code that loads the real ones (`encoder.name: local-dir:FOLDER`).

**Training.** Rendered streets of the `web` style (`models/miniature/`), new ones in every step.
Three lessons: crops against their captions (contrastive); the words of a crop's caption against its
patches; and the words of *windows* of 16 and 32 pixels of the whole view against the patches inside
(found: every named word matches a patch; chosen: every patch matches a named word), on the features
of strides 8, 16 and 32. The maps of strides 8 and 16 into the joint space are training aids and do
not ship.

**What it is not.** The captions come from a renderer: they name everything that is visible, and
those of windows come close to weak region labels. Text from the web tells far less. And it has seen
many styles where the labelled source is one, as the real CLIP has. It knows some sixty words, all
of streets.""",
    "sam": """A small SAM in `segment_anything`'s own classes (`Sam`, `ImageEncoderViT`,
`PromptEncoder`, `MaskDecoder`); the encoder's patch embedding is a stack of convolutions
(`vit_stem`), because a transformer on bare patches learns edges slowly from few pictures.
`config.json` holds the constructors' sizes, the weights carry the official names.
Pictures of 64x128 fill the upper half of its 128x128 input, as SAM pads.

**Training.** Rendered streets of the `web` style, new ones in every step. Regions are things,
pieces of stuff and connected components of classes of at least 48 pixels; prompts are a point,
several points, a box, a mask, or a mask with points, made from masks as wrong as a model's in a
domain it never saw (mean IoU about 0.54); a share of the steps decodes twice, with the first mask
and a corrective click. Patches of 4 make masks as fine as the picture; training began with the
tensors that fit (191 of 199) of a first SAM with patches of 8, which had learned 6000 steps of 48
prompts (`pretrain_sam.start`; it lies in this project's history at f450372). Losses: 20 x focal +
dice on the best of three masks and on the single one, IoU prediction, and a training aid that does
not ship: whether neighbouring cells show the same entity. No class is ever told.

**What it is not.** A general segmenter: it knows rendered streets at this size. Regions below 48
pixels were not trained.""",
    "writer": """A small Llama in transformers' own classes (`AutoModelForCausalLM`, `AutoTokenizer`
with a chat template): `write_prompts` loads and asks it as any other model
(`write_prompts.model: builtin:writer`).

**Training.** Requests as `write_prompts` makes them: planned by `prompts/plan.py`, worded by
`prompts/writer.yaml`, for the classes of the label spaces miniature and cityscapes19. The replies
are sentences put together by rule from the shapes and phrases of
`models/miniature/writer_phrases.yaml`, new ones in every step; only such as pass the checks of
`prompts/replies.py`. The fixed parts of a request are single tokens, and the chat template shows
the last request alone. Training began with the writer before this one (`pretrain_writer.start`; it
lies in this project's history at f450372, 2400 steps on 76800 sentences), whose lessons named the
season so seldom that it hardly ever did.

**What it is not.** A language model of English: it knows some six hundred words, all of streets,
and answers this one request. It learned from a rule of ours, so it shows that the path from
instruction to prompt works with a trained model, not that a model was needed. Another wording of
the instruction (`prompts/writer.yaml`) calls for another training.""",
    "painter": """A small Stable Diffusion in the libraries' own classes (diffusers'
`StableDiffusionPipeline`, `UNet2DConditionModel`, `AutoencoderTiny`, `DPMSolverMultistepScheduler`;
transformers' `CLIPTextModel`, `CLIPTokenizer`): `synthesize` loads and asks it as any other
(`synthesize.model: builtin:painter`). Pictures are 64x128, latents 8x16 with 16 channels.

**Training.** Rendered streets of the `web` style, each as it is and mirrored. The latents are the
principal components of 8x8 patches, in closed form, each scaled to the fourth root of its variance;
the autoencoder's encoder is those components written as convolutions. Its decoder learns to undo
them (absolute error of pixels and of edges, latents slightly noised). The denoiser and the text
tower learn velocities at all times alike, on sentences that are worded anew every time
(`models/miniature/painter_lessons.py`): captions, freer and shorter sentences, and a share of
silence for guidance. {began}

**What it is not.** A painter of anything but rendered streets of this size. Its sentences come from
a renderer and are true of what they name; where things stand ("on the left") was made up, so such
words do nothing. It has seen many styles where the labelled source is one, as the real one has.""",
}


def write_card(
    folder: Path,
    network: str,
    *,
    manifest: Mapping[str, Any],
    gates: Mapping[str, Any],
    below_gate: str | None = None,
) -> None:
    """Write `README.md` for a folder with weights.

    Args:
        folder: the network's folder.
        network: "clip", "sam", "writer" or "painter".
        manifest: of the artifact it comes from.
        gates: the network's part of `gates.json`.
        below_gate: why it ships although it did not pass.
    """
    numbers = manifest["summary"]["numbers"]
    section = manifest["config"][manifest["stage"]]
    facts = {
        "Steps": f"{numbers['steps']:.0f} of a schedule of {section['steps']}",
        **{name.capitalize(): numbers[name] for name in _LESSONS if name in numbers},
        "CPU hours": f"{numbers['cpu_s'] / 3600:.2f} (one thread, beside other work)",
        "Seed": manifest["seed"],
        "Precision": f"{manifest['precision']} autocast; shipped as fp16",
        "Settings": ", ".join(f"{key} {value}" for key, value in _used(section).items()),
        "Code": manifest.get("git_revision") or "unknown",
        "Gate": "passed" if gates["passed"] else f"NOT passed: {below_gate}",
    }
    table = [f"| {name} | {value} |" for name, value in facts.items()]
    about = _ABOUT[network].replace("{began}", _began(section))
    quality = _QUALITY[network](gates)
    lines = [
        f"# {_TITLES[network]}",
        "",
        *(" ".join(part.split()) + "\n" for part in about.split("\n\n")),
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *table,
        "",
        f"## Quality, on {'requests' if network == 'writer' else 'pictures'} that no training saw",
        "",
        *quality,
        "",
        "## Files",
        "",
        "| file | bytes | SHA-256 |",
        "|---|---|---|",
        *_files(folder),
        "",
    ]
    (folder / CARD_NAME).write_text("\n".join(lines), encoding="utf-8")


def _began(section: Mapping[str, Any]) -> str:
    """What a painter's denoiser and text tower began with."""
    start = section.get("start")
    if start is None:
        return "They began with fresh weights."
    began = (
        "They began with those of an earlier painter (`pretrain_painter.start`, under Settings), "
        "whose latents, decoder and tokenizer are kept."
    )
    if start == "builtin:painter":
        began += (
            " It is the one that shipped before this one: an earlier version of this card, in the "
            "project's history, tells how that was trained."
        )
    return began


def _used(section: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were read: one who begins with a painter trains no decoder."""
    unread = {"decoder"} if section.get("start") is not None else set()
    return {key: value for key, value in section.items() if key not in unread}


def card_digests(folder: Path) -> dict[str, tuple[int, str]]:
    """File's path in the folder -> (bytes, SHA-256) as the folder's card states them."""
    text = (folder / CARD_NAME).read_text(encoding="utf-8")
    return {name: (int(size), digest) for name, size, digest in _DIGEST_LINE.findall(text)}


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _CARD_SUFFIXES)
    return [
        f"| `{path.relative_to(folder).as_posix()}` | {path.stat().st_size} "
        f"| `{file_digest(path)}` |"
        for path in paths
    ]


def _sam_table(gates: Mapping[str, Any]) -> list[str]:
    lines = [
        "Mean IoU of the prompt (the noisy mask it was made from; of a box: the filled box; of "
        "points: discs of the region's area) and of SAM's mask, by `SamPredictor`. "
        "`web_unseen` (dust, sodium light, faded film) and `source` are looks it never trained on.",
        "",
        "| style | prompt | of the prompt | of the mask | gain | prompts |",
        "|---|---|---|---|---|---|",
    ]
    for style, rows in gates["styles"].items():
        for kind, row in rows.items():
            lines.append(
                f"| {style} | {kind} | {row['prompt_iou']:.3f} | {row['mask_iou']:.3f} "
                f"| {row['gain']:+.3f} | {row['prompts']} |"
            )
    return lines


def _clip_table(gates: Mapping[str, Any]) -> list[str]:
    lines = [
        "mIoU (13 classes) of one light head above this tower; head and schedule are the same in "
        "every row, labels come from the `source` style alone.",
        "",
        "| tower | on web | on source |",
        "|---|---|---|",
    ]
    for case, row in gates["miou"].items():
        web, source = (", ".join(f"{100 * v:.1f}" for v in row[key]) for key in ("web", "source"))
        lines.append(f"| {case.replace('_', ' ')} | {web} | {source} |")
    return lines


def _writer_table(gates: Mapping[str, Any]) -> list[str]:
    attributes = sorted(gates["label_spaces"]["miniature"]["follows"])
    lines = [
        f"First replies to a plan, at temperature {gates['temperature']} and top_p "
        f"{gates['top_p']}. Accepted: valid by every check of `prompts/replies.py`, and neither a "
        f"copy nor a near copy of one before; the gate is {100 * gates['min_share']:.0f} % for the "
        "miniature's classes. Follows: with a phrase of the value asked for (sentences by rule "
        "leave some out, and a low temperature what is rare among them); strays: with one of "
        f"another value only; both of {', '.join(attributes)}.",
        "",
        "| label space | replies | accepted | follows, % | strays, % | words |",
        "|---|---|---|---|---|---|",
    ]
    for labels, row in gates["label_spaces"].items():
        follows, strays = (
            ", ".join(f"{100 * share:.1f}" for _, share in sorted(row[key].items()))
            for key in ("follows", "strays")
        )
        lines.append(
            f"| {labels} | {row['replies']} | {100 * row['accepted']:.1f} % | {follows} "
            f"| {strays} | {row['mean_words']} |"
        )
    samples = gates["label_spaces"]["miniature"]["samples"]
    return [*lines, "", "The first accepted:", "", *(f"- {text}" for text in samples)]


def _painter_table(gates: Mapping[str, Any]) -> list[str]:
    cases = ("rendered", "painted", "shuffled")
    informed = ", ".join(f"{case} {gates['informedness'][case]:.3f}" for case in cases)
    variety = ", ".join(f"{case} {gates['variety'][case]:.4f}" for case in cases[:2])
    dark = ", ".join(f"{case} {gates['dark_minus_bright'][case]:.1f}" for case in cases[:2])
    lines = [
        f"{gates['num_prompts']} captions of rendered pictures were painted with "
        f"{gates['paint_steps']} steps and guidance {gates['guidance']}. A segmenter above the "
        "miniature CLIP, which learned from labelled pictures of the same style, says which "
        "classes it finds (0.4 % of the pixels or more) in the rendered pictures, in the painted "
        "ones, and in the painted ones held against other captions.",
        "",
        "Recall and false alarms (found where the caption does not name it), in %:",
        "",
        "| class | rendered | painted | shuffled |",
        "|---|---|---|---|",
    ]
    for name, row in gates["classes"].items():
        shown = (
            f"{_percent(row[case]['recall'])}, {_percent(row[case]['false_alarms'])}"
            for case in cases
        )
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return [
        *lines,
        "",
        "- Informedness (recall minus false alarms), mean of the classes that enough captions "
        f"name and enough do not ({', '.join(gates['counted_classes'])}): {informed}",
        f"- Variety (mean cosine distance of CLIP features of two pictures): {variety}",
        f"- Brightness of dark hours minus that of the others, of 255: {dark}",
        f"- PSNR of the autoencoder: {gates['psnr_db']:.2f} dB",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


_QUALITY = {
    "sam": _sam_table,
    "clip": _clip_table,
    "writer": _writer_table,
    "painter": _painter_table,
}
