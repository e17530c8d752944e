from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mmgraft.data.chat.placeholder import choose_placeholder
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template, resolve_template
from mmgraft.errors import UsageError
from text_tokenizers import template, text_tokenizer
from tiny_tokenizer import RESERVED_ID, TOKENIZER_SIZE, VOCAB_SIZE, tiny_tokenizer


def _words(vocab: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(vocab, unk_token=special.get("unk_token", "a")))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_an_unused_row_of_the_embedding_comes_first() -> None:
    assert choose_placeholder(tiny_tokenizer(), VOCAB_SIZE)[0] == TOKENIZER_SIZE


def test_a_row_in_a_gap_of_the_ids_is_not_taken_for_unused() -> None:
    tokenizer = _words({"a": 0, "b": 1, "c": 3})  # 3 words, but id 3 is used
    index, why = choose_placeholder(tokenizer, 5)
    assert index == 4
    assert "no token uses" in why


def test_then_a_reserved_token() -> None:
    index, why = choose_placeholder(tiny_tokenizer(), TOKENIZER_SIZE)
    assert index == RESERVED_ID
    assert "<|reserved_0|>" in why


def test_then_padding_unknown_and_the_last_id() -> None:
    vocab = {"a": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3, "z": 4}
    padded = _words(vocab, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    assert choose_placeholder(padded, 5) == (1, "the padding token <pad>")
    shared = _words(vocab, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    assert choose_placeholder(shared, 5) == (3, "the unknown token <unk>")
    bare = _words(vocab, eos_token="<eos>", pad_token="<eos>", bos_token="<unk>", unk_token="<unk>")
    assert choose_placeholder(bare, 5)[0] == 4


def test_no_id_past_the_embedding_is_chosen() -> None:
    # A tokenizer may know more tokens than the embedding has rows.
    tokenizer = _words({"a": 0, "b": 1}, unk_token="a")
    tokenizer.add_tokens(["<|reserved_1|>"], special_tokens=True)
    assert choose_placeholder(tokenizer, 2)[0] == 0
    tokenizer.pad_token = "<|reserved_1|>"
    assert choose_placeholder(tokenizer, 2)[0] == 0


def test_chat_needs_a_template() -> None:
    assert resolve_template(None, tiny_tokenizer()) == Template("chat")
    with pytest.raises(UsageError, match="template: plain"):
        resolve_template("chat", tiny_tokenizer(chat_template=False))
    assert resolve_template("plain", tiny_tokenizer(chat_template=False)) == Template("plain")


def test_a_file_is_read_and_its_faults_are_told(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text(template("zephyr"))
    bad.write_text("{% for m in messages %}\n{% endif %}")
    tokenizer = text_tokenizer("byte_bpe")
    assert resolve_template(str(good), tokenizer) == Template("file", template("zephyr"))
    with pytest.raises(UsageError, match=r"bad\.jinja, line 2: .*endif"):
        resolve_template(str(bad), tokenizer)
    with pytest.raises(UsageError, match="no template file"):
        resolve_template(str(tmp_path / "none.jinja"), tokenizer)


def test_a_template_that_wants_no_lone_user_turn_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "strict.jinja"
    path.write_text("{{ raise_exception('needs a system turn') }}")
    assert resolve_template(str(path), text_tokenizer("byte_bpe")).kind == "file"


def test_a_refusal_names_the_row_and_what_the_template_says() -> None:
    processor = GraftProcessor(text_tokenizer("byte_bpe", template("gemma2")), 4, 4)
    for content in ("Be kind.", [{"type": "image", "image": "a.png"}]):
        messages = [{"role": "system", "content": content}, {"role": "user", "content": "Hi"}]
        with pytest.raises(UsageError, match=r"row 3: .*System role not supported"):
            processor.encode(messages, where="row 3")


def test_plain_has_no_tools_and_needs_an_end() -> None:
    processor = GraftProcessor(text_tokenizer("byte_bpe"), 4, 4, "plain")
    with pytest.raises(UsageError, match="plain text has no tools"):
        processor.encode([{"role": "user", "content": "Hi"}], tools=[{}])
    endless = text_tokenizer("byte_bpe")
    endless.eos_token = None
    processor = GraftProcessor(endless, 4, 4, "plain")
    with pytest.raises(UsageError, match="end-of-sequence"):
        processor.encode([{"role": "assistant", "content": "Hi"}])
    with pytest.raises(UsageError, match="resolve_template"):
        GraftProcessor(endless, 4, 4, "vicuna.jinja")
