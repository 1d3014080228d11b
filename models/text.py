"""Language in the decoder: score maps of pixels and class names, and a classifier of text.

Sources: Rao et al., DenseCLIP (CVPR 2022), section 3.3 (context decoder, score map, learned
context); Hümmer et al., VLTSeg (2023); Yu et al., FC-CLIP (NeurIPS 2023), section 3.2 (text
classifier).
"""

# B batch, K classes, S synonyms of all classes, C channels, D width inside, N visual tokens or
# words of a sentence, H W size of a map
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class PlainAttention(nn.Module):
    """Multi-head attention without biases before and with one after, as in DenseCLIP."""

    def __init__(self, width: int, *, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, queries_BKD: torch.Tensor, memory_BND: torch.Tensor) -> torch.Tensor:
        """Attend from queries to a memory; same shape out as the queries."""
        queries, keys, values = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection, x in (
                (self.q_proj, queries_BKD),
                (self.k_proj, memory_BND),
                (self.v_proj, memory_BND),
            )
        )
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(attended.transpose(1, 2).flatten(2))


class ContextLayer(nn.Module):
    """Self-attention of the texts, attention to the picture, feed-forward; pre-norm."""

    def __init__(self, width: int, *, heads: int, dropout: float):
        super().__init__()
        self.self_attn = PlainAttention(width, heads=heads)
        self.cross_attn = PlainAttention(width, heads=heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
        )

    def forward(self, texts_BKD: torch.Tensor, memory_BND: torch.Tensor) -> torch.Tensor:
        """One layer; same shape out as the texts."""
        normed = self.norm1(texts_BKD)
        texts_BKD = texts_BKD + self.self_attn(normed, normed)
        texts_BKD = texts_BKD + self.cross_attn(self.norm2(texts_BKD), memory_BND)
        return texts_BKD + self.dropout(self.mlp(self.norm3(texts_BKD)))


class ContextDecoder(nn.Module):
    """What a picture has to say about the class texts: a correction of their embeddings."""

    def __init__(
        self,
        channels: int,
        *,
        width: int = 256,
        heads: int = 4,
        layers: int = 3,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, width), nn.LayerNorm(width)
        )
        self.text_proj = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.decoder = nn.ModuleList(
            ContextLayer(width, heads=heads, dropout=dropout) for _ in range(layers)
        )
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))

    def forward(self, texts_BKC: torch.Tensor, visual_BNC: torch.Tensor) -> torch.Tensor:
        """Corrections of the texts, [B, K, C], from the picture's tokens."""
        memory_BND = self.memory_proj(visual_BNC)
        texts_BKD = self.text_proj(texts_BKC)
        for layer in self.decoder:
            texts_BKD = layer(texts_BKD, memory_BND)
        return self.out_proj(texts_BKD)


def score_map(visual_BCHW: torch.Tensor, texts_BKC: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of every pixel and every text, [B, K, H, W]."""
    visual = F.normalize(visual_BCHW, dim=1)
    texts = F.normalize(texts_BKC, dim=2)
    return torch.einsum("bchw,bkc->bkhw", visual, texts)


class LearnedContext(nn.Module):
    """Embeddings of class names behind learned words, the same for all classes.

    The sentence of a class is [start; learned words; name; end]. A frozen text tower reads it, and
    the words learn through the tower (Zhou et al., CoOp, IJCV 2022, section 3.2; in the form and
    with the initial values of DenseCLIP's released code).

    Args:
        tower: open_clip's text tower with a causal mask; of its vocabulary only the words of the
            names are kept.
        tokens_KN: token ids of each name: start, name, end (the highest id), then padding.
        words: number of learned words.

    Raises:
        ValueError: the sentences are longer than the tower reads.
    """

    def __init__(self, tower: nn.Module, tokens_KN: torch.Tensor, *, words: int):
        super().__init__()
        ends_K = tokens_KN.argmax(1)
        length = int(ends_K.max()) + 1
        if length + words > tower.context_length:
            raise ValueError(
                f"decoder.text.context_words {words}: with a class name of {length} tokens that is "
                f"more than the {tower.context_length} tokens that the text tower reads"
            )
        embedding = tower.token_embedding.weight.detach()
        self.register_buffer("names_KNC", embedding[tokens_KN[:, :length].to(embedding.device)])
        self.register_buffer("ends_K", (ends_K + words).to(embedding.device), persistent=False)
        self.context = nn.Parameter(torch.empty(words, embedding.shape[1]))
        nn.init.trunc_normal_(self.context)
        tower.token_embedding = nn.Identity()
        self.tower = tower.requires_grad_(False).eval()
        self.width: int = tower.output_dim

    def train(self, mode: bool = True) -> "LearnedContext":
        """Training mode; the tower stays in eval mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self) -> torch.Tensor:
        """Embeddings of the classes [K, C], not normalised."""
        names_KNC, tower = self.names_KNC, self.tower
        context = self.context.expand(len(names_KNC), -1, -1)
        sentences_KNC = torch.cat([names_KNC[:, :1], context, names_KNC[:, 1:]], 1)
        length = sentences_KNC.shape[1]
        # Nothing behind a word is seen by it: the padding of shorter names changes nothing.
        read_KNC = tower.transformer(
            sentences_KNC + tower.positional_embedding[:length],
            attn_mask=tower.attn_mask[:length, :length],
        )
        ends_K1C = self.ends_K[:, None, None].expand(-1, 1, read_KNC.shape[2])
        last_KC = tower.ln_final(read_KNC.gather(1, ends_K1C)[:, 0])
        if isinstance(tower.text_projection, nn.Linear):
            return tower.text_projection(last_KC)
        return last_KC @ tower.text_projection


class LanguageGuidance(nn.Module):
    """Score maps of class texts that were corrected by the picture (DenseCLIP, post-model).

    Features are brought into the texts' space by a learned 1x1 convolution, so that it works on
    any encoder.

    Args:
        texts: normalised embeddings of the class names [K, C], kept as a buffer; or what makes
            them behind learned words.
        channels: channels of the features.
    """

    def __init__(self, texts: torch.Tensor | LearnedContext, channels: int):
        super().__init__()
        self.learned = texts if isinstance(texts, LearnedContext) else None
        if self.learned is None:
            self.register_buffer("texts_KC", texts)
        width = texts.shape[1] if self.learned is None else texts.width
        self.project = nn.Conv2d(channels, width, 1)
        self.context_decoder = ContextDecoder(width)
        self.gamma_text = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, features_BCHW: torch.Tensor) -> torch.Tensor:
        """Cosine similarities [B, K, H, W] of pixels and corrected texts."""
        visual = self.project(features_BCHW)
        tokens_BNC = visual.flatten(2).transpose(1, 2)
        tokens_BNC = torch.cat([tokens_BNC.mean(1, keepdim=True), tokens_BNC], 1)
        texts_KC = self.texts_KC if self.learned is None else self.learned()
        texts_BKC = texts_KC.expand(len(visual), -1, -1)
        corrected = texts_BKC + self.gamma_text * self.context_decoder(texts_BKC, tokens_BNC)
        return score_map(visual, corrected)


class TextClassifier(nn.Module):
    """Queries against text embeddings: the best synonym of a class counts, void is learned.

    Args:
        texts_SC: embeddings of all synonyms, one class after another; kept as a buffer.
        synonyms: number of synonyms of each class.
        width: channels of the queries.
    """

    def __init__(self, texts_SC: torch.Tensor, synonyms: Sequence[int], *, width: int):
        super().__init__()
        self.synonyms = tuple(synonyms)
        self.register_buffer("texts_SC", F.normalize(texts_SC, dim=-1))
        self.project = nn.Linear(width, texts_SC.shape[1])
        self.void = nn.Parameter(torch.randn(1, texts_SC.shape[1]) * 0.02)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, queries_BQC: torch.Tensor) -> torch.Tensor:
        """Class logits [B, Q, K + 1]."""
        projected = F.normalize(self.project(queries_BQC), dim=-1)
        texts = torch.cat([self.texts_SC, F.normalize(self.void, dim=-1)])
        scale = self.logit_scale.exp().clamp(max=100)
        similarities = scale * projected @ texts.T.to(projected.dtype)
        parts = similarities.split([*self.synonyms, 1], dim=-1)
        return torch.stack([part.amax(-1) for part in parts], -1)
