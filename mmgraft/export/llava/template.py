"""The chat template of an exported model: the graft's own, behind lines that place the images."""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from mmgraft.data.chat.template import Template, reads_parts

_FLATTEN = """\
{#- Written by mmgraft: a list of content parts becomes one text, each image the image token, and
    a newline stands between an image and the text after it. -#}
{%- set seen = namespace(messages=[], images=EVERY) -%}
{%- for message in messages -%}
  {%- if message.content is iterable and message.content is not string -%}
    {%- for part in message.content -%}
      {%- if part.type in ['image', 'image_url'] -%}{%- set seen.images = true -%}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set parts = message.content is iterable and message.content is not string -%}
  {%- if parts and (seen.images or not message.content) -%}
    {%- set flat = namespace(text='', after_image=false) -%}
    {%- for part in message.content -%}
      {%- if part.type in ['image', 'image_url'] -%}
        {%- set flat.text = flat.text + IMAGE -%}
        {%- set flat.after_image = true -%}
      {%- elif part.text is string -%}
        {%- if part.text -%}
          {%- if flat.after_image and part.text[0] not in ['\\n', '\\r'] -%}
            {%- set flat.text = flat.text + '\\n' -%}
          {%- endif -%}
          {%- set flat.text = flat.text + part.text -%}
          {%- set flat.after_image = false -%}
        {%- endif -%}
      {%- else -%}
        {{- raise_exception('a content part is neither text nor image') -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set seen.messages = seen.messages + [dict(message, content=flat.text)] -%}
  {%- else -%}
    {%- set seen.messages = seen.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = seen.messages %}
"""

_PLAIN = """\
{%- if tools -%}{{- raise_exception('plain text has no tools') -}}{%- endif -%}
{%- set all = namespace(text='') -%}
{%- for message in messages -%}
  {%- set content = message.content or '' -%}
  {%- set answer = message.role == 'assistant' -%}
  {%- if all.text and content and not all.text[-1].isspace() and not content[0].isspace() -%}
    {%- set wall = namespace(here=false) -%}
    {%- for text in WALLS -%}
      {%- if all.text.endswith(text) or content.startswith(text) -%}
        {%- set wall.here = true -%}
      {%- endif -%}
    {%- endfor -%}
    {%- if not wall.here -%}
      {%- set all.text = all.text + (' ' if answer else '\\n') -%}
    {%- endif -%}
  {%- endif -%}
  {%- set all.text = all.text + content -%}
  {%- if answer -%}{%- set all.text = all.text + END -%}{%- endif -%}
{%- endfor -%}
{{- all.text -}}
"""

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


def _flatten(image_token: str, every: bool) -> str:
    """Return lines that flatten conversations with images, or every one with a list of parts."""
    return _FLATTEN.replace("IMAGE", json.dumps(image_token)).replace("EVERY", json.dumps(every))


def _plain(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """Plain text. What the tokenizer puts before a text of its own accord, it puts there itself."""
    end = tokenizer.eos_token
    walls = [image_token, *([str(end)] if end else [])]
    text = _PLAIN.replace("WALLS", json.dumps(walls))
    if end:
        return text.replace("END", json.dumps(str(end)))
    return text.replace("{%- set all.text = all.text + END -%}", _PLAIN_WITHOUT_END)
