"""Checkpoints in the published systems' names: every tensor finds its place or is refused.

The files are written here under the names of the released checkpoints, because the released files
themselves are not at hand.
"""

import json
import re
from dataclasses import replace

import pytest
import torch

from models.build import build_segmenter
from models.checkpoints import KeyReport
from models.config import SegmenterConfig
from models.imports import ImportReport, import_segmenter, read_state
from models.inference import predict
from stages.adoption import key_report

NAMES = ["road", "sky", "car"]
DECODER = {
    "width": 32,
    "queries": 5,
    "layers": 2,
    "heads": 4,
    "ffn": 32,
    "pixel_layers": 1,
    "pixel_ffn": 32,
    "group_norm": 8,
}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "embed_dim": 16}
EVA = {
    "timm_model_name": "eva02_base_patch16_clip_224",
    "timm_options": {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64},
}
CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 48]}
CONFIGS = {
    "clouds": {"encoder": {"architecture": RESNET}},
    "rein": {
        "encoder": {
            "family": "timm",
            "name": "convnext_tiny",
            "architecture": CONVNEXT,
            "output_norm": True,
        },
        "tuning": {"kind": "rein", "num_tokens": 5, "token_rank": 4},
    },
    "vltseg": {
        "encoder": {"architecture": EVA, "pyramid": "learned", "normalisation": "imagenet"},
        "tuning": {"kind": "full"},
    },
}
SHARED = [
    (
        r"pixel_decoder\.layers\.(\d+)\.linear1\.",
        r"pixel_decoder.encoder.layers.\1.ffn.layers.0.0.",
    ),
    (r"pixel_decoder\.layers\.(\d+)\.linear2\.", r"pixel_decoder.encoder.layers.\1.ffn.layers.1."),
    (r"pixel_decoder\.layers\.(\d+)\.norm1\.", r"pixel_decoder.encoder.layers.\1.norms.0."),
    (r"pixel_decoder\.layers\.(\d+)\.norm2\.", r"pixel_decoder.encoder.layers.\1.norms.1."),
    (r"pixel_decoder\.layers\.(\d+)\.attention\.", r"pixel_decoder.encoder.layers.\1.self_attn."),
    (r"pixel_decoder\.inputs\.(\d)\.0\.", r"pixel_decoder.input_convs.\1.conv."),
    (r"pixel_decoder\.inputs\.(\d)\.1\.", r"pixel_decoder.input_convs.\1.gn."),
    (r"pixel_decoder\.level_embed", "pixel_decoder.level_encoding.weight"),
    (r"pixel_decoder\.(lateral|output)\.0\.", r"pixel_decoder.\1_convs.0.conv."),
    (r"pixel_decoder\.(lateral|output)\.1\.", r"pixel_decoder.\1_convs.0.gn."),
    (r"pixel_decoder\.mask_features\.", "pixel_decoder.mask_feature."),
    (
        r"query_decoder\.layers\.(\d+)\.(cross|self)_attention\.",
        r"transformer_decoder.layers.\1.\2_attn.attn.",
    ),
    (r"query_decoder\.layers\.(\d+)\.cross_norm\.", r"transformer_decoder.layers.\1.norms.0."),
    (r"query_decoder\.layers\.(\d+)\.self_norm\.", r"transformer_decoder.layers.\1.norms.1."),
    (r"query_decoder\.layers\.(\d+)\.ffn_norm\.", r"transformer_decoder.layers.\1.norms.2."),
    (r"query_decoder\.layers\.(\d+)\.linear1\.", r"transformer_decoder.layers.\1.ffn.layers.0.0."),
    (r"query_decoder\.layers\.(\d+)\.linear2\.", r"transformer_decoder.layers.\1.ffn.layers.1."),
    (r"query_decoder\.norm\.", "transformer_decoder.post_norm."),
    (r"query_decoder\.classifier\.", "cls_embed."),
    (r"query_decoder\.query_from_tokens\.", "querys2feat."),
    (r"query_decoder\.", ""),
]
FOREIGN = {
    "clouds": [
        (r"encoder\.trunk\.", "backbone.clip_model.visual."),
        (r"decoder\.pixel_decoder\.inputs\.", "sem_seg_head.pixel_decoder.input_proj."),
        (
            r"decoder\.pixel_decoder\.level_embed",
            "sem_seg_head.pixel_decoder.transformer.level_embed",
        ),
        (
            r"decoder\.pixel_decoder\.layers\.(\d+)\.attention\.",
            r"sem_seg_head.pixel_decoder.transformer.encoder.layers.\1.self_attn.",
        ),
        (
            r"decoder\.pixel_decoder\.layers\.",
            "sem_seg_head.pixel_decoder.transformer.encoder.layers.",
        ),
        (r"decoder\.pixel_decoder\.lateral\.0\.", "sem_seg_head.pixel_decoder.adapter_1."),
        (r"decoder\.pixel_decoder\.lateral\.1\.", "sem_seg_head.pixel_decoder.adapter_1.norm."),
        (r"decoder\.pixel_decoder\.output\.0\.", "sem_seg_head.pixel_decoder.layer_1."),
        (r"decoder\.pixel_decoder\.output\.1\.", "sem_seg_head.pixel_decoder.layer_1.norm."),
        (r"decoder\.pixel_decoder\.", "sem_seg_head.pixel_decoder."),
        (r"decoder\.query_decoder\.query_feat", "sem_seg_head.predictor.static_query"),
        (r"decoder\.query_decoder\.mask_embed\.0\.", "sem_seg_head.predictor.mask_embed.layers.0."),
        (r"decoder\.query_decoder\.mask_embed\.2\.", "sem_seg_head.predictor.mask_embed.layers.1."),
        (r"decoder\.query_decoder\.mask_embed\.4\.", "sem_seg_head.predictor.mask_embed.layers.2."),
        (r"decoder\.query_decoder\.classifier\.", "sem_seg_head.predictor.class_embed."),
        (r"decoder\.query_decoder\.norm\.", "sem_seg_head.predictor.decoder_norm."),
        (
            r"decoder\.query_decoder\.layers\.(\d+)\.cross_attention\.",
            r"sem_seg_head.predictor.transformer_cross_attention_layers.\1.multihead_attn.",
        ),
        (
            r"decoder\.query_decoder\.layers\.(\d+)\.self_attention\.",
            r"sem_seg_head.predictor.transformer_self_attention_layers.\1.self_attn.",
        ),
        (
            r"decoder\.query_decoder\.layers\.(\d+)\.(cross|self)_norm\.",
            r"sem_seg_head.predictor.transformer_\2_attention_layers.\1.norm.",
        ),
        (
            r"decoder\.query_decoder\.layers\.(\d+)\.ffn_norm\.",
            r"sem_seg_head.predictor.transformer_ffn_layers.\1.norm.",
        ),
        (r"decoder\.query_decoder\.layers\.", "sem_seg_head.predictor.transformer_ffn_layers."),
        (r"decoder\.query_decoder\.", "sem_seg_head.predictor."),
    ],
    "rein": [
        (r"encoder\.trunk\.stem\.", "backbone.downsample_layers.0."),
        (r"encoder\.trunk\.stages\.(\d)\.downsample\.", r"backbone.downsample_layers.\1."),
        (
            r"encoder\.trunk\.stages\.(\d)\.blocks\.(\d+)\.conv_dw\.",
            r"backbone.stages.\1.\2.depthwise_conv.",
        ),
        (
            r"encoder\.trunk\.stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)\.",
            r"backbone.stages.\1.\2.pointwise_conv\3.",
        ),
        (r"encoder\.trunk\.stages\.(\d)\.blocks\.", r"backbone.stages.\1."),
        (r"encoder\.norms\.(\d)\.", r"backbone.norm\1."),
        (r"tokens\.stages\.(\d)\.tokens_a_LTR", r"backbone.reins.\1.learnable_tokens_a"),
        (r"tokens\.stages\.(\d)\.tokens_b_LRC", r"backbone.reins.\1.learnable_tokens_b"),
        (r"tokens\.stages\.(\d)\.token_to_feature\.", r"backbone.reins.\1.mlp_token2feat."),
        (r"tokens\.stages\.(\d)\.correction\.", r"backbone.reins.\1.mlp_delta_f."),
        (r"tokens\.stages\.(\d)\.to_query\.", r"backbone.reins.\1.transform."),
        (r"tokens\.stages\.", "backbone.reins."),
        *((rf"decoder\.{ours}", f"decode_head.{theirs}") for ours, theirs in SHARED),
    ],
    "vltseg": [
        (
            r"encoder\.trunk\.blocks\.(\d+)\.attn\.([qv])_proj\.bias",
            r"backbone.blocks.\1.attn.\2_bias",
        ),
        (r"encoder\.trunk\.blocks\.(\d+)\.attn\.norm\.", r"backbone.blocks.\1.attn.inner_attn_ln."),
        (r"encoder\.trunk\.blocks\.(\d+)\.mlp\.norm\.", r"backbone.blocks.\1.mlp.ffn_ln."),
        (r"encoder\.trunk\.blocks\.(\d+)\.mlp\.fc1_g\.", r"backbone.blocks.\1.mlp.w1."),
        (r"encoder\.trunk\.blocks\.(\d+)\.mlp\.fc1_x\.", r"backbone.blocks.\1.mlp.w2."),
        (r"encoder\.trunk\.blocks\.(\d+)\.mlp\.fc2\.", r"backbone.blocks.\1.mlp.w3."),
        (r"encoder\.trunk\.", "backbone."),
        (r"neck\.fpn2\.", "backbone.fpn2.0."),
        (r"neck\.", "backbone."),
        *((rf"decoder\.{ours}", f"decode_head.{theirs}") for ours, theirs in SHARED),
    ],
}
EXTRA = {
    "clouds": {"backbone.clip_model.logit_scale": 1, "sam.mask_decoder.weight": 3},
    "rein": {"data_preprocessor.mean": 3},
    "vltseg": {"backbone.blocks.0.attn.rope.freqs_cos": 4},
}


def small_config(origin: str, **encoder: object) -> SegmenterConfig:
    sections = {"decoder": DECODER} | CONFIGS[origin]
    return SegmenterConfig.model_validate(sections | {"encoder": sections["encoder"] | encoder})


def trained_segmenter(origin: str, **encoder: object):
    segmenter = build_segmenter(small_config(origin, **encoder), class_names=NAMES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in segmenter.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
    return segmenter.eval()


def foreign_state(segmenter, origin: str) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in segmenter.state_dict().items():
        for pattern, replacement in FOREIGN[origin]:
            foreign, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        else:
            raise AssertionError(name)
        state[foreign] = value
    return state | {name: torch.zeros(size) for name, size in EXTRA[origin].items()}


def some_images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, 64, 96), generator=generator, dtype=torch.uint8)


class Helper:
    """A pickled object like those that training frameworks leave in their files."""

    def __init__(self):
        self.history = [1, 2]


@pytest.mark.parametrize("origin", CONFIGS)
def test_a_published_checkpoint_predicts_the_same_after_import(tmp_path, origin):
    segmenter = trained_segmenter(origin)
    path = tmp_path / "theirs.pth"
    key = "model" if origin == "clouds" else "state_dict"
    torch.save({key: foreign_state(segmenter, origin), "helper": Helper()}, path)
    imported, report = import_segmenter(path, config=small_config(origin), class_names=NAMES)
    assert torch.equal(predict(imported, some_images()), predict(segmenter, some_images()))
    assert report.origin == origin
    assert set(report.left_out) == set(EXTRA[origin])
    assert report.keys.complete
    assert f"{len(EXTRA[origin])} not needed" in str(report)


@pytest.mark.parametrize("origin", CONFIGS)
@pytest.mark.parametrize("damage", ["drop", "add", "reshape"])
def test_a_partial_match_is_refused(tmp_path, origin, damage):
    state = foreign_state(trained_segmenter(origin), origin)
    name = next(n for n in state if "mask_embed" in n)
    if damage == "drop":
        del state[name]
    elif damage == "add":
        name = name.replace("mask_embed", "mask_embad")
        state[name] = torch.zeros(1)
    else:
        state[name] = torch.zeros(2)
    torch.save(state, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="mask_emb"):
        import_segmenter(tmp_path / "theirs.pth", config=small_config(origin), class_names=NAMES)


def test_frozen_weights_of_the_file_are_held_against_the_configured_ones(tmp_path):
    segmenter = trained_segmenter("clouds")
    state = foreign_state(segmenter, "clouds")
    torch.save({"model": state}, tmp_path / "theirs.pth")
    tower = {f"visual.{k}": v.clone() for k, v in segmenter.encoder.trunk.state_dict().items()}
    torch.save(tower, tmp_path / "tower.bin")
    config = small_config("clouds", weights=str(tmp_path / "tower.bin"))
    _, report = import_segmenter(tmp_path / "theirs.pth", config=config, class_names=NAMES)
    assert report.verified == len(tower)
    tower["visual.conv1.weight"] += 1
    torch.save(tower, tmp_path / "tower.bin")
    with pytest.raises(ValueError, match="conv1"):
        import_segmenter(tmp_path / "theirs.pth", config=config, class_names=NAMES)


def test_a_rein_file_without_its_backbone_asks_for_it(tmp_path):
    state = foreign_state(trained_segmenter("rein"), "rein")
    light = {n: v for n, v in state.items() if n.startswith(("backbone.reins", "decode_head"))}
    torch.save({"state_dict": light}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"encoder\.weights"):
        import_segmenter(tmp_path / "theirs.pth", config=small_config("rein"), class_names=NAMES)


def test_files_are_read_without_running_them(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (print, ("sprung",))

    torch.save({"model": {"a": torch.ones(1)}, "trap": Trap()}, tmp_path / "trap.pth")
    assert list(read_state(tmp_path / "trap.pth")) == ["a"]
    assert "sprung" not in capsys.readouterr().out
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(ValueError, match="plain tensors"):
        read_state(tmp_path / "noise.pth")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_state(tmp_path / "nothing.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no names of CLOUDS"):
        import_segmenter(tmp_path / "other.pth", config=small_config("clouds"), class_names=NAMES)


MMPRETRAIN = [
    (r"backbone\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (
        r"backbone\.blocks\.(\d+)\.attn\.inner_attn_ln\.",
        r"backbone.layers.\1.attn.inner_attn_norm.",
    ),
    (r"backbone\.blocks\.(\d+)\.mlp\.ffn_ln\.", r"backbone.layers.\1.mlp.norm."),
    (r"backbone\.blocks\.", "backbone.layers."),
    (r"backbone\.fpn2\.0\.", "backbone.fpn2."),
]
MMSEG = [
    (r"backbone\.fpn1\.", "neck.upsample_4x."),
    (r"backbone\.fpn2\.", "neck.upsample_2x."),
]


def renamed(state, rules):
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        found[name] = value
    return found


def fused(state, *, key_bias: float = 0.0):
    """mmpretrain's names, queries, keys and values in one layer, and the two gates in one."""
    state = renamed(state, MMPRETRAIN)
    for name in [n for n in state if n.endswith(".q_proj.weight")]:
        attention = name.removesuffix(".q_proj.weight")
        weights = [state.pop(f"{attention}.{part}_proj.weight") for part in "qkv"]
        state[f"{attention}.qkv.weight"] = torch.cat(weights)
        queries, values = (state.pop(f"{attention}.{part}_bias") for part in "qv")
        keys = torch.full_like(queries, key_bias)
        state[f"{attention}.qkv.bias"] = torch.cat([queries, keys, values])
        mlp = attention.removesuffix("attn") + "mlp"
        for kind in ("weight", "bias"):
            gates = [state.pop(f"{mlp}.w{part}.{kind}") for part in (1, 2)]
            state[f"{mlp}.w12.{kind}"] = torch.cat(gates)
    return state


@pytest.mark.parametrize("style", ["mmpretrain", "mmsegmentation's neck"])
def test_vltseg_is_known_by_other_frameworks_names_as_well(tmp_path, style):
    segmenter = trained_segmenter("vltseg")
    state = foreign_state(segmenter, "vltseg")
    state = fused(state) if style == "mmpretrain" else renamed(state, MMSEG)
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    imported, report = import_segmenter(
        tmp_path / "theirs.pth", config=small_config("vltseg"), class_names=NAMES
    )
    assert report.complete
    assert torch.equal(predict(imported, some_images()), predict(segmenter, some_images()))


def test_keys_with_a_bias_are_refused(tmp_path):
    state = fused(foreign_state(trained_segmenter("vltseg"), "vltseg"), key_bias=0.1)
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="give their keys a bias"):
        import_segmenter(tmp_path / "theirs.pth", config=small_config("vltseg"), class_names=NAMES)


def test_a_file_with_another_eva_says_how_to_build_it(tmp_path):
    options = EVA["timm_options"] | {"img_size": 96, "scale_attn_inner": False}
    public = {"architecture": EVA | {"timm_options": options}}
    segmenter = trained_segmenter("vltseg", **public)
    torch.save({"state_dict": foreign_state(segmenter, "vltseg")}, tmp_path / "theirs.pth")
    path, refused = tmp_path / "theirs.pth", small_config("vltseg")
    with pytest.raises(ValueError, match="6x6 patches and no norm inside attention") as error:
        import_segmenter(path, config=refused, class_names=NAMES)
    settings = dict(
        re.findall(r"--set segmenter\.encoder\.(\w+)='?(\{.*\}|null)'?", str(error.value))
    )
    told = {name: json.loads(value) for name, value in settings.items()}
    imported, _ = import_segmenter(path, config=small_config("vltseg", **told), class_names=NAMES)
    assert torch.equal(predict(imported, some_images()), predict(segmenter, some_images()))


def test_the_key_report_says_that_reins_own_backbone_is_not_compared():
    keys = KeyReport(matched=("decoder.x",), missing=(), unexpected=(), misshapen=())
    left_out = ("backbone.cls_token", "backbone.blocks.0.norm1.weight", "data_preprocessor.mean")
    whole = ImportReport(origin="rein", keys=keys, left_out=left_out)
    said = "\n".join(key_report(whole))
    assert "not compared 2 tensors of the file's own encoder" in said
    light = replace(whole, left_out=left_out[2:])
    assert "not compared" not in "\n".join(key_report(light))
    assert "not compared" not in "\n".join(key_report(replace(whole, origin="vltseg")))
