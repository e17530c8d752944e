"""The card of an exported model."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from mmgraft import __version__
from mmgraft.export.llava.fit import Ingredients, text_note

_HUB = "https://huggingface.co/"

_CARD = """\
---
{front}---

# {title}

A vision-language model that stock transformers loads, without mmgraft and without remote code. It
was exported from a graft: {method} on the language model {base}.

**{note}.**
The graft itself leaves the base as it was and can run several workflows; an export cannot.

| | |
|---|---|
{facts}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{title}")
model = AutoModelForImageTextToText.from_pretrained("{title}", dtype="auto", device_map="auto")
messages = [
    {{
        "role": "user",
        "content": [
            {{"type": "image", "path": "photo.jpg"}},
            {{"type": "text", "text": "What is in the image?"}},
        ],
    }}
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

Text that contains `{token}` literally is read as an image position, as in every LLaVA model.
The model was trained on images resized by PIL. Where torchvision is installed, transformers
resizes with that, and pixels differ a little; for the same ones add

```python
from transformers import AutoImageProcessor

processor.image_processor = AutoImageProcessor.from_pretrained("{title}", backend="pil")
```
"""


def llava_card(made_of: Ingredients, title: str, image_token: str, difference: float) -> str:
    """Write the card as Markdown with its front matter.

    Args:
        made_of: The parts.
        title: Name of the folder.
        image_token: Text of the image token.
        difference: Largest difference of a logit from the graft's, as measured.
    """
    record = made_of.record
    local = record.base.id.startswith((".", "/"))
    front = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if not local:
        front["base_model"] = record.base.id
    tags = ["mmgraft", "llava", record.method, "vision-language", "multimodal"]
    note = text_note(record, bool(made_of.inserted or made_of.owns))
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(made_of, difference))
    return _CARD.format(
        front=yaml.safe_dump({**front, "tags": tags}, sort_keys=False),
        title=title,
        method=f"`{record.method}`",
        base="in a local folder" if local else f"[{record.base.id}]({_HUB}{record.base.id})",
        note=note[0].upper() + note[1:],
        facts=facts,
        token=image_token,
    )


def _facts(made_of: Ingredients, difference: float) -> Iterator[tuple[str, str]]:
    record, tower = made_of.record, made_of.tower
    yield "workflow", f"`{record.workflow}`"
    layers = f"{len(made_of.layers)} of class `{made_of.anatomy.class_name}`"
    if made_of.inserted:
        layers += f", inserted after {', '.join(map(str, made_of.inserted))}"
    yield "decoder layers", layers
    name = tower.spec.name
    yield "vision tower", "from a local folder" if name.startswith((".", "/")) else f"`{name}`"
    yield "hidden state of the tower", str(tower.feature_map.layer)
    yield "positions an image", str(tower.num_patches)
    yield "dtype", str(made_of.dtype).removeprefix("torch.")
    yield "largest difference of a logit from the graft's", f"{difference:.1e}"
    yield "written by", f"mmgraft {__version__}"
