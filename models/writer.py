"""Write text with a causal language model: chats in, replies out, one seed per reply.

writer = load_writer("Qwen/Qwen2.5-7B-Instruct")
replies = writer.write(chats, seeds=[0, 1], max_new_tokens=96, temperature=0.9, top_p=0.95)
"""

# B conversations, T tokens, V vocabulary
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils.logging import disable_progress_bar

from models.hub import Source, find_model, loading
from models.reply import Reply
from models.tensors import refusing_code

RANDOM = "random"
"""Model reference of a tiny language model with seeded random weights."""
_CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class GumbelNoise(LogitsProcessor):
    """Turns greedy search into sampling with one random stream per sequence.

    The token with the largest log-probability plus Gumbel noise is a draw from the distribution
    (the Gumbel-max trick), so that a draw depends on its own seed and not on batch mates.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform_BV = torch.stack(
            [torch.rand(scores.shape[1], generator=generator) for generator in self._generators]
        ).to(scores.device)
        tiny = torch.finfo(torch.float32).tiny
        return scores.float() - torch.log(-torch.log(uniform_BV.clamp(tiny, 1 - 2**-24)))


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    untrained: bool = False
    """Whether its weights are random."""

    @torch.inference_mode()
    def write(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[Reply]:
        """Answer a batch of conversations.

        Args:
            conversations: turns with "role" (user or assistant) and "content", user last.
            seeds: one per conversation.
            max_new_tokens: longest reply.
            temperature: of the sampling; 0: always the most probable token.
            top_p: sample from the most probable tokens that together have this probability.
        """
        inputs = self._encode(conversations)
        noise = []
        if temperature > 0:
            noise = [
                TemperatureLogitsWarper(temperature),
                TopPLogitsWarper(top_p),
                GumbelNoise(seeds),
            ]
        ends = _end_tokens(self.model, self.tokenizer)
        output_BT = self.model.generate(
            **inputs,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
            ),
            logits_processor=LogitsProcessorList(noise),
        )
        return [self._decode(row_T, ends) for row_T in output_BT[:, inputs["input_ids"].shape[1] :]]

    def _encode(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> dict:
        texts = [
            self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for turns in conversations
        ]
        inputs = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _decode(self, row_T: torch.Tensor, ends: Sequence[int]) -> Reply:
        tokens = row_T.tolist()
        finished = any(token in ends for token in tokens)
        if finished:
            tokens = tokens[: next(i for i, token in enumerate(tokens) if token in ends)]
        return Reply(
            text=self.tokenizer.decode(tokens, skip_special_tokens=True), finished=finished
        )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return sorted({end for end in ends if end is not None})


def load_writer(
    reference: str,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Writer:
    """Load a causal language model and its chat template.

    Args:
        reference: hub id, local folder, builtin:NAME, or "random" (tiny, seeded random weights).
        revision: of a hub model.
        device: where to.
        device_map: in place of `device`: spread the layers over several, as accelerate's word says.
        dtype: of the weights.
        seed: of random weights.

    Raises:
        FileNotFoundError: weights that are neither here nor to be fetched.
        ValueError: the model has no chat template.
    """
    if reference == RANDOM:
        with tempfile.TemporaryDirectory() as folder:
            save_random_writer(Path(folder), seed=seed)
            source = Source(name=folder, local_only=True)
            return _load(
                source, None, device=device, device_map=device_map, dtype=dtype, untrained=True
            )
    source = find_model(
        reference,
        revision=revision,
        marker="config.json",
        option="write_prompts.model",
        otherwise="Or set write_prompts.model=bank: the shipped prompts, without a model.",
    )
    return _load(
        source, revision, device=device, device_map=device_map, dtype=dtype, untrained=False
    )


def _load(
    source: Source,
    revision: str | None,
    *,
    device: torch.device | str,
    device_map: str | None,
    dtype: torch.dtype,
    untrained: bool,
) -> Writer:
    disable_progress_bar()
    where = {"revision": revision, "local_files_only": source.local_only}
    with loading(source.name, option="write_prompts.model"):
        tokenizer = AutoTokenizer.from_pretrained(source.name, **where)
    if tokenizer.chat_template is None:
        raise _no_chat_template(source.name)
    what = f"write_prompts.model: {source.name}"
    with refusing_code(what), loading(source.name, option="write_prompts.model"):
        model = AutoModelForCausalLM.from_pretrained(
            source.name, dtype=dtype, device_map=device_map, **where
        )
    if device_map is None:
        model = model.to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Writer(model=model.eval(), tokenizer=tokenizer, untrained=untrained)


def _no_chat_template(source: str) -> ValueError:
    return ValueError(
        f"write_prompts.model: {source!r} has no chat template, so it was not trained to follow "
        "instructions. Choose an instruction-tuned model (often named -Instruct or -chat)."
    )


def save_random_writer(folder: Path, *, seed: int) -> None:
    """Save a tiny Llama with seeded random weights and a tokenizer of single bytes."""
    disable_progress_bar()
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=_CHAT_TEMPLATE,
    )


@lru_cache(maxsize=1)
def _clip_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def count_clip_tokens(text: str) -> int:
    """Tokens of a text for CLIP's text encoder, begin and end token included."""
    return len(_clip_tokenizer().encode(text)) + 2
