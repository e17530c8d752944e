"""The chat template of an exported model: the graft's own, behind lines that place the images.

``parts.jinja`` and ``plain.jinja`` are those lines; words in capitals in them are filled in here.
"""

from __future__ import annotations

import json
from importlib.resources import files

from transformers import PreTrainedTokenizerBase

from mmgraft.data.chat.template import Template, reads_parts

_PLAIN_WITHOUT_END = (
    "{{- raise_exception('plain text ends an answer with the end-of-sequence token, and this "
    "tokenizer has none') -}}"
)


def image_template(
    template: Template, tokenizer: PreTrainedTokenizerBase, image_token: str
) -> str | dict[str, str]:
    """Return a template that stock transformers renders as mmgraft's processor renders the graft's.

    Args:
        template: The graft's.
        tokenizer: The base's, untouched.
        image_token: Text of the token that stands for an image.

    Returns:
        The jinja text, or several by name where the tokenizer has several.
    """
    if template.kind == "plain":
        return _flatten(image_token, every=True) + _plain(tokenizer, image_token)
    every = not reads_parts(template, tokenizer)
    own = template.text if template.kind == "file" else tokenizer.chat_template
    if isinstance(own, dict):
        return {name: _flatten(image_token, every) + text for name, text in own.items()}
    return _flatten(image_token, every) + str(own)


def _read(name: str) -> str:
    return files("mmgraft.export.llava").joinpath(name).read_text(encoding="utf-8")


def _flatten(image_token: str, every: bool) -> str:
    """Return lines that flatten conversations with images, or every one with a list of parts."""
    text = _read("parts.jinja")
    return text.replace("IMAGE", json.dumps(image_token)).replace("EVERY", json.dumps(every))


def _plain(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """Plain text. What the tokenizer puts before a text of its own accord, it puts there itself."""
    end = tokenizer.eos_token
    walls = [image_token, *([str(end)] if end else [])]
    text = _read("plain.jinja").replace("WALLS", json.dumps(walls))
    if end:
        return text.replace("END", json.dumps(str(end)))
    return text.replace("{%- set all.text = all.text + END -%}", _PLAIN_WITHOUT_END)
