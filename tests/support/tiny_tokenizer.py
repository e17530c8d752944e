"""A byte-level BPE tokenizer made in code, with the special tokens of a chat model."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|reserved_0|>",
]
BOS_ID, EOS_ID, PAD_ID, IM_START_ID, IM_END_ID, RESERVED_ID = range(len(SPECIAL_TOKENS))

VOCAB_SIZE = 320
"""Rows of the tiny models' embeddings: a few more than the tokenizer has words, as often seen."""

TOKENIZER_SIZE = 312

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SENTENCES = [
    "What colour is the square in the picture? The square in the picture is blue.",
    "Is there a triangle in the image? No, there is a circle and a rectangle in the image.",
    "user asks and assistant answers; system says nothing at all, not even an <image> tag.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "One, two, three images: describe what they have in common and how they differ.",
]


@lru_cache(maxsize=1)
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    chat_template: bool | str = True, add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the tiny models.

    Args:
        chat_template: ChatML if true, none if false, or the template itself.
        add_bos: put `<|bos|>` before every encoded text, as Llama's tokenizer does.
    """
    backend = Tokenizer.from_str(_backend())
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A",
            pair="<|bos|> $A <|bos|> $B",
            special_tokens=[("<|bos|>", BOS_ID)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        model_max_length=128,
    )
    if chat_template:
        tokenizer.chat_template = CHATML if chat_template is True else chat_template
    return tokenizer
