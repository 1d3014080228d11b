"""Other people's parameter names, translated into ours.

Each table is a list of (pattern, replacement) for whole names; a name that no pattern matches is
not translated and reported by the caller. Names are facts of the released checkpoints
(CLOUDS: detectron2; Rein and VLTSeg: mmdetection and mmsegmentation; mmpretrain's ConvNeXt).
"""

import re
from collections.abc import Mapping, Sequence

import torch

Rules = Sequence[tuple[str, str]]

CLOUDS_DECODER: Rules = [
    (r"pixel_decoder\.input_proj\.(.+)", r"pixel_decoder.inputs.\1"),
    (r"pixel_decoder\.transformer\.level_embed", r"pixel_decoder.level_embed"),
    (
        r"pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)",
        r"pixel_decoder.layers.\1.attention.\2",
    ),
    (r"pixel_decoder\.transformer\.encoder\.layers\.(.+)", r"pixel_decoder.layers.\1"),
    (r"pixel_decoder\.adapter_1\.norm\.(.+)", r"pixel_decoder.lateral.1.\1"),
    (r"pixel_decoder\.adapter_1\.weight", r"pixel_decoder.lateral.0.weight"),
    (r"pixel_decoder\.layer_1\.norm\.(.+)", r"pixel_decoder.output.1.\1"),
    (r"pixel_decoder\.layer_1\.weight", r"pixel_decoder.output.0.weight"),
    (r"pixel_decoder\.mask_features\.(.+)", r"pixel_decoder.mask_features.\1"),
    (r"predictor\.static_query\.weight", r"query_decoder.query_feat.weight"),
    (r"predictor\.(query_feat|query_embed|level_embed)\.weight", r"query_decoder.\1.weight"),
    (r"predictor\.decoder_norm\.(.+)", r"query_decoder.norm.\1"),
    (r"predictor\.class_embed\.(.+)", r"query_decoder.classifier.\1"),
    (r"predictor\.mask_embed\.layers\.0\.(.+)", r"query_decoder.mask_embed.0.\1"),
    (r"predictor\.mask_embed\.layers\.1\.(.+)", r"query_decoder.mask_embed.2.\1"),
    (r"predictor\.mask_embed\.layers\.2\.(.+)", r"query_decoder.mask_embed.4.\1"),
    (
        r"predictor\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)",
        r"query_decoder.layers.\1.cross_attention.\2",
    ),
    (
        r"predictor\.transformer_self_attention_layers\.(\d+)\.self_attn\.(.+)",
        r"query_decoder.layers.\1.self_attention.\2",
    ),
    (
        r"predictor\.transformer_(cross|self)_attention_layers\.(\d+)\.norm\.(.+)",
        r"query_decoder.layers.\2.\1_norm.\3",
    ),
    (
        r"predictor\.transformer_ffn_layers\.(\d+)\.norm\.(.+)",
        r"query_decoder.layers.\1.ffn_norm.\2",
    ),
    (r"predictor\.transformer_ffn_layers\.(.+)", r"query_decoder.layers.\1"),
]
"""CLOUDS' head (after `sem_seg_head.`) to ours (after `decoder.`)."""

MMDET_DECODER: Rules = [
    (r"pixel_decoder\.input_convs\.(\d)\.conv\.(.+)", r"pixel_decoder.inputs.\1.0.\2"),
    (r"pixel_decoder\.input_convs\.(\d)\.gn\.(.+)", r"pixel_decoder.inputs.\1.1.\2"),
    (r"pixel_decoder\.level_encoding\.weight", r"pixel_decoder.level_embed"),
    (
        r"pixel_decoder\.encoder\.layers\.(\d+)\.self_attn\.(.+)",
        r"pixel_decoder.layers.\1.attention.\2",
    ),
    (
        r"pixel_decoder\.encoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)",
        r"pixel_decoder.layers.\1.linear1.\2",
    ),
    (
        r"pixel_decoder\.encoder\.layers\.(\d+)\.ffn\.layers\.1\.(.+)",
        r"pixel_decoder.layers.\1.linear2.\2",
    ),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.(.+)", r"pixel_decoder.layers.\1.norm1.\2"),
    (r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.(.+)", r"pixel_decoder.layers.\1.norm2.\2"),
    (r"pixel_decoder\.lateral_convs\.0\.conv\.(.+)", r"pixel_decoder.lateral.0.\1"),
    (r"pixel_decoder\.lateral_convs\.0\.gn\.(.+)", r"pixel_decoder.lateral.1.\1"),
    (r"pixel_decoder\.output_convs\.0\.conv\.(.+)", r"pixel_decoder.output.0.\1"),
    (r"pixel_decoder\.output_convs\.0\.gn\.(.+)", r"pixel_decoder.output.1.\1"),
    (r"pixel_decoder\.mask_feature\.(.+)", r"pixel_decoder.mask_features.\1"),
    (
        r"transformer_decoder\.layers\.(\d+)\.(cross|self)_attn\.attn\.(.+)",
        r"query_decoder.layers.\1.\2_attention.\3",
    ),
    (
        r"transformer_decoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)",
        r"query_decoder.layers.\1.linear1.\2",
    ),
    (
        r"transformer_decoder\.layers\.(\d+)\.ffn\.layers\.1\.(.+)",
        r"query_decoder.layers.\1.linear2.\2",
    ),
    (
        r"transformer_decoder\.layers\.(\d+)\.norms\.0\.(.+)",
        r"query_decoder.layers.\1.cross_norm.\2",
    ),
    (
        r"transformer_decoder\.layers\.(\d+)\.norms\.1\.(.+)",
        r"query_decoder.layers.\1.self_norm.\2",
    ),
    (r"transformer_decoder\.layers\.(\d+)\.norms\.2\.(.+)", r"query_decoder.layers.\1.ffn_norm.\2"),
    (r"transformer_decoder\.post_norm\.(.+)", r"query_decoder.norm.\1"),
    (r"(query_feat|query_embed|level_embed)\.weight", r"query_decoder.\1.weight"),
    (r"querys2feat\.(.+)", r"query_decoder.query_from_tokens.\1"),
    (r"cls_embed\.(.+)", r"query_decoder.classifier.\1"),
    (r"mask_embed\.(.+)", r"query_decoder.mask_embed.\1"),
]
"""mmdetection's Mask2FormerHead and Rein's (after `decode_head.`) to ours (after `decoder.`)."""

REIN_TOKENS: Rules = [
    (r"learnable_tokens", r"tokens_LTC"),
    (r"learnable_tokens_a", r"tokens_a_LTR"),
    (r"learnable_tokens_b", r"tokens_b_LRC"),
    (r"scale", r"scale"),
    (r"mlp_token2feat\.(.+)", r"token_to_feature.\1"),
    (r"mlp_delta_f\.(.+)", r"correction.\1"),
    (r"transform\.(.+)", r"to_query.\1"),
    (r"merge\.(.+)", r"merge.\1"),
]
"""One of Rein's token modules to our `TokenCorrection`."""

MMPRETRAIN_CONVNEXT: Rules = [
    (r"downsample_layers\.0\.(.+)", r"trunk.stem.\1"),
    (r"downsample_layers\.(\d)\.(.+)", r"trunk.stages.\1.downsample.\2"),
    (r"stages\.(\d)\.(\d+)\.depthwise_conv\.(.+)", r"trunk.stages.\1.blocks.\2.conv_dw.\3"),
    (r"stages\.(\d)\.(\d+)\.pointwise_conv1\.(.+)", r"trunk.stages.\1.blocks.\2.mlp.fc1.\3"),
    (r"stages\.(\d)\.(\d+)\.pointwise_conv2\.(.+)", r"trunk.stages.\1.blocks.\2.mlp.fc2.\3"),
    (r"stages\.(\d)\.(\d+)\.(.+)", r"trunk.stages.\1.blocks.\2.\3"),
    (r"norm(\d)\.(.+)", r"norms.\1.\2"),
]
"""mmpretrain's ConvNeXt to our `ConvNextEncoder` around timm's."""


EVA_ENCODER: Rules = [
    (r"(cls_token|pos_embed)", r"encoder.trunk.\1"),
    (r"patch_embed\.(?:proj|projection)\.(.+)", r"encoder.trunk.patch_embed.proj.\1"),
    (r"BLOCK\.attn\.([qkv])_bias", r"encoder.trunk.blocks.\1.attn.\2_proj.bias"),
    (r"BLOCK\.attn\.inner_attn_(?:ln|norm)\.(.+)", r"encoder.trunk.blocks.\1.attn.norm.\2"),
    (r"BLOCK\.mlp\.(?:ffn_ln|norm)\.(.+)", r"encoder.trunk.blocks.\1.mlp.norm.\2"),
    (r"BLOCK\.mlp\.w1\.(.+)", r"encoder.trunk.blocks.\1.mlp.fc1_g.\2"),
    (r"BLOCK\.mlp\.w2\.(.+)", r"encoder.trunk.blocks.\1.mlp.fc1_x.\2"),
    (r"BLOCK\.mlp\.w3\.(.+)", r"encoder.trunk.blocks.\1.mlp.fc2.\2"),
    (r"BLOCK\.((?:norm1|norm2|attn)\..+)", r"encoder.trunk.blocks.\1.\2"),
    (r"fpn1\.(.+)", r"neck.fpn1.\1"),
    (r"fpn2\.(?:0\.)?(weight|bias)", r"neck.fpn2.\1"),
]
EVA_ENCODER = [(p.replace("BLOCK", r"(?:blocks|layers)\.(\d+)"), r) for p, r in EVA_ENCODER]
"""EVA-02 and the pyramid inside it (after `backbone.`) to ours, timm's inside.

The authors of VLTSeg released no code. Known are the names of the public re-implementation, whose
checkpoints are the published ones: EVA's own (`blocks.0.attn.q_bias`, `mlp.w1`, `fpn2.0.weight`),
and in its earlier form mmpretrain's (`layers.0.attn.qkv`, `mlp.w12`, `fpn2.weight`).
"""

FUSED = {
    r"(.+\.attn)\.qkv\.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    r"(.+\.attn)\.qkv\.bias": ("q_bias", "k_bias", "v_bias"),
    r"(.+\.mlp)\.w12\.weight": ("w1.weight", "w2.weight"),
    r"(.+\.mlp)\.w12\.bias": ("w1.bias", "w2.bias"),
}
"""mmpretrain's fused layers of EVA-02, and EVA's names of their parts, in the order of the rows."""

MMSEG_PYRAMID: Rules = [
    (r"upsample_4x\.(.+)", r"fpn1.\1"),
    (r"upsample_2x\.0\.(.+)", r"fpn2.\1"),
]
"""mmsegmentation's `Feature2Pyramid` (after `neck.`) to our `LearnedPyramid`.

No checkpoint of VLTSeg with these names is known. It is the neck that mmsegmentation offers for
plain transformers, made of the same layers, so that a model trained there may well have it.
"""


def unfuse(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mmpretrain's fused layers of EVA-02 in the parts that EVA names; all else as it is.

    Raises:
        ValueError: keys have a bias, for which EVA-02 has no place.
    """
    parts: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        for pattern, names in FUSED.items():
            if match := re.fullmatch(pattern, name):
                rows = value.chunk(len(names))
                parts |= {f"{match[1]}.{n}": part for n, part in zip(names, rows, strict=True)}
                break
        else:
            parts[name] = value
    biases = [name for name in parts if name.endswith(".attn.k_bias")]
    biased = [name for name in biases if parts[name].any()]
    if biased:
        raise ValueError(
            f"{len(biased)} attention layers give their keys a bias (first: {biased[0]}), which "
            "EVA-02 does not have: with rotary positions it changes what the encoder sees"
        )
    return {name: value for name, value in parts.items() if name not in set(biases)}


def rename(
    state: Mapping[str, torch.Tensor], rules: Rules, *, prefix: str = "", new_prefix: str = ""
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Translate the names that begin with `prefix`.

    Args:
        state: tensors by foreign name.
        rules: the first pattern that matches a whole name (less the prefix) translates it.
        prefix: other names are left out of both results.
        new_prefix: put before the translated names.

    Returns:
        Tensors by our name, and the foreign names that no rule knows.
    """
    found, strange = {}, []
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        for pattern, replacement in rules:
            match = re.fullmatch(pattern, name.removeprefix(prefix))
            if match:
                found[new_prefix + match.expand(replacement)] = value
                break
        else:
            strange.append(name)
    return found, strange
