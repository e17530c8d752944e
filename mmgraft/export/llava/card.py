"""The card of an exported model."""

from __future__ import annotations

from collections.abc import Iterator

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
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(made_of, difference))
    return render(
        "export/llava/card.md.jinja",
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
