"""Language in the decoder."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.build import build_segmenter
from models.checkpoints import load_segmenter, save_segmenter, saved_state
from models.config import SegmenterConfig
from models.losses import SetCriterion
from models.text import ContextDecoder, TextClassifier, score_map

NAMES = ["road", "traffic light", "person"]
TOWER = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "embed_dim": 16}
DECODER = {
    "width": 32,
    "queries": 4,
    "layers": 2,
    "heads": 4,
    "ffn": 32,
    "pixel_layers": 1,
    "pixel_ffn": 32,
    "group_norm": 8,
}


def small_segmenter(encoder=None, device="cpu", kind="mask2former", **text):
    config = SegmenterConfig.model_validate(
        {
            "encoder": encoder or {"architecture": TOWER},
            "decoder": DECODER | {"text": text, "kind": kind},
            "losses": {"points": 50},
        }
    )
    return build_segmenter(config, class_names=NAMES, device=device)


def some_images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)


def test_the_best_synonym_of_a_class_counts():
    torch.manual_seed(0)
    texts = torch.randn(4, 8)
    classifier = TextClassifier(texts, [1, 3], width=6)
    queries = torch.randn(2, 5, 6)
    logits = classifier(queries)
    projected = classifier.project(queries)
    scale = classifier.logit_scale.exp()
    each = scale * F.cosine_similarity(projected[:, :, None], texts, dim=-1)
    void = scale * F.cosine_similarity(projected, classifier.void[0], dim=-1)
    expected = torch.stack([each[..., 0], each[..., 1:].amax(-1), void], -1)
    torch.testing.assert_close(logits, expected)
    assert scale.item() == pytest.approx(1 / 0.07)


def test_the_scale_of_the_classifier_is_clamped():
    classifier = TextClassifier(torch.eye(2, 4), [1, 1], width=4)
    with torch.no_grad():
        classifier.logit_scale.fill_(math.log(1000))
    assert classifier(torch.randn(1, 3, 4)).abs().max() <= 100.001


def test_scores_are_cosines():
    torch.manual_seed(0)
    visual, texts = torch.randn(2, 6, 3, 4), torch.randn(2, 5, 6)
    scores = score_map(visual, texts)
    expected = F.cosine_similarity(visual[0, :, 1, 2], texts[0, 3], dim=0)
    torch.testing.assert_close(scores[0, 3, 1, 2], expected)


def test_the_context_decoder_hears_the_picture():
    torch.manual_seed(0)
    decoder = ContextDecoder(8, width=16, heads=2, layers=1).eval()
    texts, picture = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    assert not torch.allclose(decoder(texts, picture), decoder(texts, -picture))
    # the order of the picture's tokens does not matter
    torch.testing.assert_close(decoder(texts, picture), decoder(texts, picture.flip(1)))


def test_a_text_classifier_replaces_the_linear_one():
    segmenter = small_segmenter(classifier=True, synonyms={"person": ("man", "woman")})
    output = segmenter(some_images())
    assert output.class_logits_BQK1.shape == (2, 4, 4)
    classifier = segmenter.decoder.query_decoder.classifier
    assert classifier.synonyms == (1, 1, 3)
    norms = classifier.texts_SC.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(5))
    assert not any("texts" in name for name, _ in segmenter.named_parameters())


@pytest.mark.parametrize("kind", ["mask2former", "light"])
def test_guidance_adds_score_maps_and_their_loss(kind):
    segmenter = small_segmenter(guidance=True, kind=kind)
    output = segmenter(some_images())
    assert output.text_scores_BKHW.shape == (2, 3, 2, 2)
    assert output.text_scores_BKHW.abs().max() <= 1.0001
    labels = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    losses = SetCriterion(segmenter.config.losses, 3)(output, labels, seeds=[0, 1])
    resized = F.interpolate(output.text_scores_BKHW / 0.07, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(losses["loss_text"], F.cross_entropy(resized, labels.long()))
    losses["total"].backward()
    parts = dict(segmenter.decoder.guidance.named_parameters())
    assert all(p.grad is not None for p in parts.values())


def test_templates_change_the_texts_and_seeds_their_random_tower():
    def texts(**options):
        segmenter = small_segmenter(classifier=True, **options)
        return segmenter.decoder.query_decoder.classifier.texts_SC

    assert torch.equal(texts(), texts())
    assert not torch.allclose(texts(), texts(templates=("a {} in a street.",)))
    assert not torch.allclose(texts(), texts(seed=1))


def test_weights_of_the_text_tower_are_loaded_beside_those_of_the_image_tower(tmp_path):
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(4)
    text = {"width": 32, "heads": 2, "layers": 1}
    vision = {k: v for k, v in TOWER.items() if k != "embed_dim"}
    clip = CLIP(16, vision, text).eval()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    encoder = {"architecture": TOWER, "weights": str(tmp_path / "clip.safetensors")}
    segmenter = small_segmenter(encoder, classifier=True)
    import open_clip

    tokens = open_clip.tokenize([f"a photo of a {name}." for name in NAMES])
    with torch.no_grad():
        expected = clip.encode_text(tokens, normalize=True)
    torch.testing.assert_close(segmenter.decoder.query_decoder.classifier.texts_SC, expected)
    trunk = segmenter.encoder.trunk
    assert torch.equal(trunk.conv1.weight, clip.visual.conv1.weight)


def test_learned_words_are_read_as_the_same_words_of_a_sentence_are():
    import open_clip

    segmenter = small_segmenter(guidance=True, context_words=4)
    learned = segmenter.decoder.guidance.learned
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = text_tower()
    sentences = open_clip.tokenize([f"a photo of the {name}" for name in NAMES])
    with torch.no_grad():
        learned.context.copy_(tower.token_embedding(sentences[0, 1:5]))
        torch.testing.assert_close(learned(), tower(sentences))


def text_tower():
    from open_clip.model import _build_text_tower

    return _build_text_tower(16, {"width": 32, "heads": 2, "layers": 1}).eval()


def test_words_learn_through_a_tower_that_stays_as_it_is():
    segmenter = small_segmenter(guidance=True, context_words=3).train()
    learned = segmenter.decoder.guidance.learned
    assert not learned.tower.training
    before = {n: v.clone() for n, v in learned.tower.state_dict().items()}
    labels = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    criterion = SetCriterion(segmenter.config.losses, 3)
    optimizer = torch.optim.AdamW(segmenter.parameter_groups(1e-2, 0.05))
    criterion(segmenter(some_images()), labels, seeds=[0, 1])["total"].backward()
    assert learned.context.grad.abs().min() > 0
    words = learned.context.detach().clone()
    optimizer.step()
    assert (learned.context != words).all()
    assert all(torch.equal(v, before[n]) for n, v in learned.tower.state_dict().items())


def test_learned_words_are_stored_without_the_tower_that_reads_them(tmp_path):
    segmenter = small_segmenter(guidance=True, context_words=3).eval()
    with torch.no_grad():
        segmenter.decoder.guidance.learned.context.mul_(2)
    save_segmenter(tmp_path, segmenter, label_space="any", step=1)
    loaded = load_segmenter(tmp_path)
    scores, again = (s(some_images()).text_scores_BKHW for s in (segmenter, loaded))
    assert torch.equal(scores, again)
    stored = saved_state(segmenter)
    assert not any(".tower." in name for name in stored)
    assert "decoder.guidance.learned.context" in stored


@pytest.mark.parametrize(("words", "message"), [(80, "more than the 77 tokens"), (-1, "greater")])
def test_too_many_or_too_few_learned_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        small_segmenter(guidance=True, context_words=words)


def test_learned_words_of_a_true_model_on_the_meta_device():
    segmenter = small_segmenter(
        {"name": "EVA02-L-14"}, device="meta", guidance=True, context_words=8
    )
    learned = segmenter.decoder.guidance.learned
    assert learned.context.shape == (8, 768)
    assert learned().shape == (3, 768)


def test_the_meta_device_needs_no_text_tower():
    segmenter = small_segmenter({"name": "RN50"}, device="meta", classifier=True)
    assert segmenter.decoder.query_decoder.classifier.texts_SC.shape == (3, 1024)


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        ({"family": "timm", "name": "resnet10t"}, {"classifier": True}, "no text tower"),
        (None, {"classifier": True, "synonyms": {"dog": ("cat",)}}, "no class is called dog"),
        (None, {"classifier": True, "kind": "light"}, "no queries"),
        (None, {"context_words": 8}, "set guidance to true"),
        (
            {"family": "timm", "name": "resnet10t"},
            {"guidance": True, "context_words": 8},
            "no text tower",
        ),
    ],
)
def test_language_is_refused_where_it_cannot_work(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        small_segmenter(encoder, **options)
