"""The miniature's writer: transformers' Llama at a small size, with a small tokenizer.

tokenizer = train_tokenizer(texts, fixed=["You write descriptions of street photographs"])
network = build_writer(tokenizer)

`AutoModelForCausalLM` and `AutoTokenizer` load the folder that `save_writer` leaves.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
"""The shipped sizes, as `LlamaConfig` names them; the vocabulary's comes from the tokenizer."""

REQUEST_MARK = "Scene:"
"""By this the chat template knows a request from a follow-up to a refused reply."""

CHAT_TEMPLATE = (
    "{% set last = namespace(request=messages[-1]['content']) %}"
    "{% for turn in messages %}"
    "{% if turn['role'] == 'user' and '" + REQUEST_MARK + "' in turn['content'] %}"
    "{% set last.request = turn['content'] %}"
    "{% endif %}"
    "{% endfor %}"
    "<start>{{ last.request }}<reply>"
)
"""Shows the last request alone: the examples before it are always the same, and what was wrong with
a refused reply is more than so small a model could use."""


def train_tokenizer(
    texts: Sequence[str], *, fixed: Sequence[str], vocabulary: int = 2048
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every fixed part of a request is a single token.

    Args:
        texts: what it learns its words from.
        fixed: parts that all requests share; without space at the ends.
        vocabulary: tokens, those of `fixed` not counted.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=["<pad>", "<start>", "<reply>", "<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in fixed])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=SIZES["max_position_embeddings"],
    )


def build_writer(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of `SIZES` with fresh weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SIZES,
        )
    )


def save_writer(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write config, fp16 weights, tokenizer and chat template."""
    network.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
