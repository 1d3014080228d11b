"""What the segmenter is measured against: transformers' Mask2Former, and the released losses.

The losses of CLOUDS' release are written out step by step: one matching per prediction and picture,
each with a round trip to the host.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerTransformerModule,
)

CLASSES = 19


class HfHead(nn.Module):
    """transformers' modules put together as its own model does, for our encoder's features."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.config = Mask2FormerConfig(num_labels=CLASSES, decoder_layers=10, encoder_layers=6)
        self.pixel_decoder = Mask2FormerPixelDecoder(self.config, feature_channels=channels)
        nn.init.normal_(self.pixel_decoder.level_embed)
        self.transformer = Mask2FormerTransformerModule(256, self.config)
        self.class_predictor = nn.Linear(256, CLASSES + 1)
        weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
        self.weights = weights
        self.criterion = Mask2FormerLoss(self.config, weights)

    def forward(self, features: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(class logits, masks) of all ten predictions."""
        pixels = self.pixel_decoder(features)
        out = self.transformer(
            multi_scale_features=pixels.multi_scale_features,
            mask_features=pixels.mask_features,
            output_hidden_states=True,
        )
        classes = [self.class_predictor(h.transpose(0, 1)) for h in out.intermediate_hidden_states]
        return list(zip(classes, out.masks_queries_logits, strict=True))

    def loss(self, predictions: list, labels_BHW: torch.Tensor) -> torch.Tensor:
        """Its loss, as its own model calls it."""
        masks, classes = binary_targets(labels_BHW)
        *earlier, (logits, final) = predictions
        losses = self.criterion(
            masks_queries_logits=final,
            class_queries_logits=logits,
            mask_labels=masks,
            class_labels=classes,
            auxiliary_predictions=[
                {"masks_queries_logits": m, "class_queries_logits": c} for c, m in earlier
            ],
        )
        return sum(
            value * next(w for key, w in self.weights.items() if key in name)
            for name, value in losses.items()
        )


def binary_targets(labels_BHW: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One float mask per class and picture, and the classes."""
    classes = [v[v != 255].long() for v in (labels.unique() for labels in labels_BHW)]
    masks = [
        (labels == present[:, None, None]).float()
        for labels, present in zip(labels_BHW, classes, strict=True)
    ]
    return masks, classes


def sample(masks_NHW: torch.Tensor, points_NP2: torch.Tensor) -> torch.Tensor:
    """Masks at points."""
    grid = 2 * points_NP2[:, :, None] - 1
    return F.grid_sample(masks_NHW[:, None], grid, align_corners=False)[:, 0, :, 0]


def released_loss(predictions: list, labels_BHW: torch.Tensor) -> torch.Tensor:
    """The released criterion, step by step: one matching per prediction and picture."""
    masks, classes = binary_targets(labels_BHW)
    total = 0
    for logits, predicted in predictions:
        pairs = [
            released_match(logits[b], predicted[b], masks[b], classes[b]) for b in range(len(masks))
        ]
        total = total + released_losses(logits, predicted, masks, classes, pairs)
    return total


@torch.no_grad()
def released_match(logits, predicted, masks, classes, points=12544):
    """Pairs of one prediction and one picture, over the host."""
    probability = logits.softmax(-1)
    places = torch.rand(1, points, 2, device=logits.device)
    guess = sample(predicted, places.expand(len(predicted), -1, -1)).float()
    truth = sample(masks, places.expand(len(masks), -1, -1)).float()
    positive = F.binary_cross_entropy_with_logits(guess, torch.ones_like(guess), reduction="none")
    negative = F.binary_cross_entropy_with_logits(guess, torch.zeros_like(guess), reduction="none")
    entropy = (positive @ truth.T + negative @ (1 - truth).T) / points
    share = guess.sigmoid()
    dice = 1 - (2 * share @ truth.T + 1) / (share.sum(-1)[:, None] + truth.sum(-1) + 1)
    cost = 5 * entropy - 2 * probability[:, classes] + 5 * dice
    return linear_sum_assignment(cost.cpu())


def released_losses(logits, predicted, masks, classes, pairs, points=12544):
    """Class, mask and dice losses of one prediction."""
    targets = torch.full(logits.shape[:2], CLASSES, device=logits.device)
    for b, (queries, columns) in enumerate(pairs):
        targets[b, queries] = classes[b][columns]
    weight = torch.ones(CLASSES + 1, device=logits.device)
    weight[-1] = 0.1
    loss_ce = F.cross_entropy(logits.transpose(1, 2), targets, weight)
    guess = torch.cat([predicted[b, q] for b, (q, _) in enumerate(pairs)])
    truth = torch.cat([masks[b][c] for b, (_, c) in enumerate(pairs)])
    count = len(guess)
    with torch.no_grad():
        candidates = torch.rand(count, 3 * points, 2, device=logits.device)
        uncertainty = -sample(guess, candidates).abs()
        uncertain = int(0.75 * points)
        kept = uncertainty.topk(uncertain, dim=1).indices
        chosen = torch.gather(candidates, 1, kept[..., None].expand(-1, -1, 2))
        uniform = torch.rand(count, points - uncertain, 2, device=logits.device)
        places = torch.cat([chosen, uniform], 1)
        truth_at = sample(truth, places)
    guess_at = sample(guess, places)
    entropy = F.binary_cross_entropy_with_logits(guess_at, truth_at, reduction="none")
    share = guess_at.sigmoid()
    dice = 1 - (2 * (share * truth_at).sum(-1) + 1) / (share.sum(-1) + truth_at.sum(-1) + 1)
    return 2 * loss_ce + 5 * entropy.mean(1).sum() / count + 5 * dice.sum() / count
