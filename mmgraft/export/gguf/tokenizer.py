"""A tokenizer as llama.cpp has it, where it is known to give the same ids."""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

from transformers import PreTrainedTokenizerBase

from mmgraft.errors import UsageError
from mmgraft.export.gguf.files import refuse

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _WORDS.replace("DIGITS", digits)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, _bytes(False)]


def _bytes(words: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}


#: Rules by which text is cut into words, by llama.cpp's names for the same.
_KNOWN: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_bytes(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(True)],
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
}

_TEXTS = (
    "What is in the image? I don't know, we'LL see: it's 3.14159 or 1,234,567 (50 %).  ",
    "\n\n one\r\ntwo\n \n\tthree\t\tfour  five \n",
    "def f(x):\n    return {'a': [x ** 2, x // 3]}  # twelve!!! ...</s><image><|nothing|>",
    "Été à Zürich, naïve Größe; 日本語とカタカナ、中文字符，한국어",
    "Привет, мир! Καλημέρα. שלום עולם مرحبا 🙂👩‍👩‍👧🇫🇷 ½ ² Ⅷ ٣٤ € ™",
)


class Vocabulary:
    """The tokens of a base, as they are written.

    Args:
        tokenizer: The base's.
        rows: Of its embedding.
        ends: Tokens that end an answer, its own first; three find a place.
        stock: Puts around a text what the exported model wants there; default: the tokenizer.

    Attributes:
        composes: Whether it normalises text to NFC, as llama.cpp does not.

    Raises:
        UsageError: Llama.cpp would give other ids.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        ends: tuple[int, ...] = (),
        stock: PreTrainedTokenizerBase | None = None,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        refuse("the base's tokenizer", {"it has no fast form": backend is None})
        self.tokenizer, self.rows, self.ends = tokenizer, rows, ends
        self.state: dict[str, Any] = json.loads(backend.to_str())  # type: ignore[union-attr]
        model, rules = self.state["model"], self.state["pre_tokenizer"] or {}
        steps = rules.get("pretokenizers", [rules])
        bare = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]
        self.pre = next((name for name, known in _KNOWN.items() if known == bare), "")
        self.composes = self.state["normalizer"] == {"type": "NFC"}
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = (stock or tokenizer)("a")["input_ids"]
        self.bos = whole != plain and whole[:1] == [tokenizer.bos_token_id]
        self.eos = whole != plain and whole[-1:] == [tokenizer.eos_token_id]
        greedy = {
            t["lstrip"] or t["rstrip"] or t["single_word"] for t in self.state["added_tokens"]
        }
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        refuse(
            "the base's tokenizer",
            {
                f"it is {model['type']}, not BPE": model["type"] != "BPE",
                f"it cuts text into words otherwise than {', '.join(_KNOWN)}": not self.pre,
                "its BPE has a setting that llama.cpp has not": any(map(model.get, odd)),
                "its ignore_merges differs": bool(model.get("ignore_merges"))
                != (self.pre == "llama-bpe"),
                "it normalises text": bool(self.state["normalizer"]) and not self.composes,
                "a token takes the white space around it": True in greedy,
                "it puts other tokens around a text than the first and the last": len(whole)
                != len(plain) + self.bos + self.eos,
            },
        )

    def describe(self, writer: "GGUFWriter", template: str = "") -> None:
        """Add tokens, merges, ids and chat template."""
        from gguf import TokenType

        model = self.state["model"]
        words = {index: (word, TokenType.NORMAL) for word, index in model["vocab"].items()}
        for token in self.state["added_tokens"]:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            words[token["id"]] = (token["content"], kind)
        listed = [words.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(self.rows)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([word for word, _ in listed])
        writer.add_token_types([kind for _, kind in listed])
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_add_bos_token(self.bos)
        writer.add_add_eos_token(self.eos)
        if isinstance(bos := self.tokenizer.bos_token_id, int):
            writer.add_bos_token_id(bos)
        adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
        for add, index in zip(adders, self.ends, strict=False):
            add(index)
        writer.add_chat_template(template)

    def compare(self, path: Path) -> None:
        """Compare ids with those of llama.cpp itself, where the package xllamacpp is installed.

        Args:
            path: A file with this vocabulary.

        Raises:
            UsageError: They differ.
        """
        try:
            engine: Any = importlib.import_module("xllamacpp")
        except ImportError:
            return
        params = engine.CommonParams()
        params.model.path, params.hostnames, params.port = str(path), ["127.0.0.1"], 0
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, 0
        params.no_extra_bufts = True  # no second copy of the weights
        try:
            server = engine.Server(params)
        except RuntimeError as error:
            raise UsageError(f"the llama.cpp here does not load the export: {error}") from error
        added = "a".join(token["content"] for token in self.state["added_tokens"])
        for text in (*_TEXTS, added):
            asked = Request(
                f"{server.listening_address}/tokenize", json.dumps({"content": text}).encode()
            )
            with urlopen(asked, timeout=60) as answer:
                given = json.load(answer)["tokens"]
            own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            refuse("the base's tokenizer", {f"the ids of {text!r} differ there": given != own})
