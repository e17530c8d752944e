"""The card of an exported model."""

from __future__ import annotations

import yaml

from mmgraft.evaluation.report.markdown import render
from mmgraft.export.llava.fit import Ingredients
from mmgraft.version import __version__

_HUB = "https://huggingface.co/"


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
    note = made_of.text_note
    return render(
        "export/llava/card.md.jinja",
        front=yaml.safe_dump({**front, "tags": tags}, sort_keys=False),
        title=title,
        base="in a local folder" if local else f"[{record.base.id}]({_HUB}{record.base.id})",
        note=note[0].upper() + note[1:],
        made_of=made_of,
        dtype=str(made_of.dtype).removeprefix("torch."),
        difference=f"{difference:.1e}",
        version=__version__,
        token=image_token,
    )
