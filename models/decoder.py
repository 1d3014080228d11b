"""The masked-attention query decoder: queries look at features where their last mask was.

Source: Cheng et al., Mask2Former (CVPR 2022), section 3.2, in the form of CLOUDS.
"""

# B batch, Q mask queries, K1 classes and one more for "nothing", C channels, N positions of a
# level, H W height and width of the mask features, M heads
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.pixel_decoder import PixelFeatures


class Prediction(NamedTuple):
    """Classes and masks of one set of queries."""

    class_logits_BQK1: torch.Tensor
    """Class scores before softmax; the last class is "nothing"."""
    masks_BQHW: torch.Tensor
    """Mask logits at the size of the mask features (stride 4)."""


class Attention(nn.Module):
    """Multi-head attention with the parameter layout of `nn.MultiheadAttention`."""

    def __init__(self, width: int, *, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        queries_BQC: torch.Tensor,
        keys_BNC: torch.Tensor,
        values_BNC: torch.Tensor,
        attend_BQN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; `attend_BQN` is true where a query may look. Same shape out as the queries."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        queries, keys, values = (
            F.linear(x, w, b).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((queries_BQC, keys_BNC, values_BNC), weights, biases, strict=True)
        )
        mask = None if attend_BQN is None else attend_BQN[:, None]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; post-norm."""

    def __init__(self, width: int, *, heads: int, ffn: int):
        super().__init__()
        self.cross_attention = Attention(width, heads=heads)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads=heads)
        self.self_norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, ffn)
        self.linear2 = nn.Linear(ffn, width)
        self.ffn_norm = nn.LayerNorm(width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        queries_BQC: torch.Tensor,
        places_QC: torch.Tensor,
        keys_BNC: torch.Tensor,
        values_BNC: torch.Tensor,
        attend_BQN: torch.Tensor,
    ) -> torch.Tensor:
        """One layer; `places_QC` are the queries' own position embeddings."""
        attended = self.cross_attention(queries_BQC + places_QC, keys_BNC, values_BNC, attend_BQN)
        queries_BQC = self.cross_norm(queries_BQC + attended)
        placed_BQC = queries_BQC + places_QC
        attended = self.self_attention(placed_BQC, placed_BQC, queries_BQC)
        queries_BQC = self.self_norm(queries_BQC + attended)
        widened = F.relu(self.linear1(queries_BQC), inplace=True)
        return self.ffn_norm(queries_BQC + self.linear2(widened))


class QueryDecoder(nn.Module):
    """Queries to classes and masks, with a prediction before the first and after every layer.

    Args:
        classifier: from queries [B, Q, C] to class logits [B, Q, K + 1].
        width: channels of queries and features.
        queries: number of queries.
        layers: number of layers; they visit strides 32, 16, 8 in turn.
        heads: attention heads.
        ffn: hidden width of the feed-forward blocks.
        linked: queries come from outside (Rein's tokens) and give position and content.
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        width: int,
        queries: int,
        layers: int,
        heads: int,
        ffn: int,
        linked: bool = False,
    ):
        super().__init__()
        if linked:
            self.query_from_tokens = nn.Linear(width, width)
        else:
            self.query_feat = nn.Embedding(queries, width)
            self.query_embed = nn.Embedding(queries, width)
        self.linked = linked
        self.level_embed = nn.Embedding(3, width)
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads=heads, ffn=ffn) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = classifier
        self.mask_embed = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
        )

    def forward(
        self, features: PixelFeatures, linked_QC: torch.Tensor | None = None
    ) -> tuple[Prediction, ...]:
        """Predictions of the initial queries and after each layer, the last one last.

        Args:
            features: of the pixel decoder.
            linked_QC: queries made by the encoder's tokens, where `linked`.
        """
        # 1. Queries, keys and values.
        if self.linked:
            assert linked_QC is not None, "a linked decoder needs the encoder's queries"
            places_QC, contents_QC = linked_QC, self.query_from_tokens(linked_QC)
        else:
            places_QC, contents_QC = self.query_embed.weight, self.query_feat.weight
        batch = features.masks_BCHW.shape[0]
        queries_BQC = contents_QC.expand(batch, *contents_QC.shape)
        values, keys, small_masks = [], [], []
        for level, (map_BCHW, codes_NC) in enumerate(
            zip(features.levels_BCHW, features.positions_NC, strict=True)
        ):
            values_BNC = map_BCHW.flatten(2).transpose(1, 2) + self.level_embed.weight[level]
            values.append(values_BNC)
            keys.append(values_BNC + codes_NC)
            # Resizing is linear, so the features are resized once instead of every query's mask.
            resized = F.interpolate(
                features.masks_BCHW.detach(),
                size=map_BCHW.shape[-2:],
                mode="bilinear",
                align_corners=False,
            )
            small_masks.append(resized.flatten(2))

        # 2. Layer after layer, each looking where its queries' last masks were.
        classes, embeddings = [], []
        for index in range(len(self.layers) + 1):
            normed_BQC = self.norm(queries_BQC)
            embeddings.append(self.mask_embed(normed_BQC))
            classes.append(self.classifier(normed_BQC))
            if index == len(self.layers):
                break
            level = index % 3
            attend_BQN = seen_places(embeddings[-1].detach(), small_masks[level])
            queries_BQC = self.layers[index](
                queries_BQC, places_QC, keys[level], values[level], attend_BQN
            )

        # 3. Masks of all predictions in one product (of the last one only, where no loss follows).
        if not self.training:
            classes, embeddings = classes[-1:], embeddings[-1:]
        masks = torch.einsum("blqc,bchw->blqhw", torch.stack(embeddings, 1), features.masks_BCHW)
        return tuple(
            Prediction(class_logits, masks_BQHW)
            for class_logits, masks_BQHW in zip(classes, masks.unbind(1), strict=True)
        )


def seen_places(embeddings_BQC: torch.Tensor, features_BCN: torch.Tensor) -> torch.Tensor:
    """Where queries may look: mask probability at least one half, or everywhere if nowhere."""
    attend_BQN = torch.bmm(embeddings_BQC, features_BCN) >= 0
    return attend_BQN | ~attend_BQN.any(-1, keepdim=True)
