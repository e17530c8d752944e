"""Tokenizers of every kind that splits text around special tokens in its own way, made in code."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).resolve().parent.parent / "data" / "templates"

BOS, EOS, UNK, PAD, SPARE = "<s>", "</s>", "<unk>", "<pad>", "<|reserved_special_token_0|>"

CONTROL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|end_of_turn|>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>", "[gMASK]", "<sop>", "[INST]", "[/INST]",
]  # fmt: skip

SPECIAL = [UNK, BOS, EOS, PAD, SPARE, *CONTROL]

_TEXT = [
    "What colour is the square in the picture? The square in the picture is blue.",
    "A chat between a curious user and an assistant. USER: asks ASSISTANT: answers",
    "<image> <think> why </think> [image] System: User: Falcon: GPT4 Correct Assistant: now",
    "Two cats, three images; describe what they have in common and how they differ: été.",
]


def template(name: str) -> str:
    """The text of a chat template in tests/data/templates."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _unigram(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=250,
        special_tokens=SPECIAL,
        unk_token=UNK,
        initial_alphabet=["\n", *map(chr, range(33, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=list(map(chr, range(33, 127))),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        special_tokens=[(BOS, SPECIAL.index(BOS)), (EOS, SPECIAL.index(EOS))],
    )
    return tokenizer


_MAKERS = {
    "byte_bpe": _byte_bpe,
    "unigram_first": lambda: _unigram("first"),
    "unigram_always": lambda: _unigram("always"),
    "wordpiece": _wordpiece,
}

KINDS = list(_MAKERS)


@cache
def _backend(kind: str) -> str:
    return _MAKERS[kind]().to_str()


def text_tokenizer(
    kind: str, chat_template: str | None = None, rstrip: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of a kind.

    Args:
        kind: one of `KINDS`.
        chat_template: the jinja text.
        rstrip: special tokens that swallow the white space after them, as Phi-3's do.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)),
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
    )
    if rstrip:
        tokenizer.add_tokens(
            [AddedToken(text, special=True, rstrip=True, normalized=False) for text in rstrip],
            special_tokens=True,
        )
    tokenizer.chat_template = chat_template
    return tokenizer
