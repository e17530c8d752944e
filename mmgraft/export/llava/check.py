"""Proof of an export: stock transformers must give the graft's own ids, pixels and logits."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import MMGraftError
from mmgraft.export.llava.fit import Ingredients
from mmgraft.frozen import Frozen
from mmgraft.model.modeling import GraftedModel

#: Largest difference of a logit, as a share of the largest logit where that is above 1.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

_POSITIONS = 16
_PIXELS = 1e-5


class Sample(Frozen):
    """A conversation and what the graft makes of it.

    Attributes:
        messages: The conversation; its images are in memory.
        inputs: What the graft's processor makes of it.
        logits: ``(16, vocab)`` of the last positions, in fp32.
    """

    messages: list[dict[str, Any]]
    inputs: dict[str, Tensor]
    logits: Tensor


@torch.no_grad()
def take_samples(made_of: Ingredients, processor: GraftProcessor, base: str | None) -> list[Sample]:
    """Run the graft itself on a conversation with two images and on one without.

    Args:
        made_of: The parts of the export.
        processor: The graft's.
        base: Where the base lies, when not where the record says.

    Raises:
        UsageError: The graft's files do not fit its record.
    """
    model = GraftedModel.from_pretrained(made_of.run, dtype=made_of.dtype, verify="off", base=base)
    if made_of.lacks:
        model.workflow().graft.active = False
    samples = []
    for messages in _conversations():
        inputs = processor(messages)
        logits = model(
            **inputs, workflow=made_of.record.workflow, logits_to_keep=_POSITIONS, use_cache=False
        ).logits
        samples.append(Sample(messages, inputs, logits[0].float()))
    return samples


@torch.no_grad()
def compare(folder: Path, samples: list[Sample], dtype: torch.dtype) -> float:
    """Load an exported folder with stock transformers and run the samples through it.

    Args:
        folder: The export.
        samples: What the graft gave.
        dtype: Of the exported weights.

    Returns:
        The largest difference of a logit.

    Raises:
        MMGraftError: Ids, pixels or logits differ by more than rounding.
    """
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    processor.image_processor = AutoImageProcessor.from_pretrained(
        folder, backend="pil", trust_remote_code=False
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False
    ).eval()
    largest = 0.0
    for sample in samples:
        inputs = processor.apply_chat_template(
            sample.messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        _compare_inputs(sample, inputs, int(model.config.image_token_id))
        pixels = sample.inputs.get("pixel_values")
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=None if pixels is None else pixels.to(dtype),
            logits_to_keep=_POSITIONS,
            use_cache=False,
        ).logits[0]
        logits = logits[:, : sample.logits.shape[1]].float()
        allowed = TOLERANCE.get(dtype, 1e-4) * max(1.0, float(sample.logits.abs().max()))
        difference = float((logits - sample.logits).abs().max())
        if not difference <= allowed:  # a nan is no proof either
            raise _failed(
                f"its logits differ from the graft's by {difference:.2g}, where {allowed:.2g} is "
                f"allowed in {str(dtype).removeprefix('torch.')}"
            )
        largest = max(largest, difference)
    return largest


def _conversations() -> list[list[dict[str, Any]]]:
    images = [{"type": "image", "image": _image(which)} for which in range(2)]
    first = [
        images[0],
        {"type": "text", "text": "What is in this image"},
        {"type": "text", "text": ", and how does it differ from"},
        images[1],
        {"type": "text", "text": "this one?"},
    ]
    return [
        [{"role": "user", "content": first}],
        [{"role": "user", "content": "Name three things that are blue."}],
    ]


def _image(which: int) -> Image.Image:
    """Return an image without symmetries: two ramps and their product."""
    width, height = 96 + 32 * which, 80
    x = torch.arange(width).expand(height, width)
    y = torch.arange(height)[:, None].expand(height, width)
    channels = [x * 2, y * 3, (x * y) // (16 + 16 * which)]
    if which:
        channels.reverse()
    return Image.fromarray((torch.stack(channels, dim=-1) % 256).to(torch.uint8).numpy())


def _compare_inputs(sample: Sample, inputs: Any, image_token: int) -> None:
    image = sample.inputs["mm_token_type_ids"] == 1
    expected = torch.where(image, image_token, sample.inputs["input_ids"])
    if not torch.equal(inputs["input_ids"], expected):
        raise _failed("its tokenizer and chat template do not give the graft's ids")
    own = sample.inputs.get("pixel_values")
    if own is None:
        return
    pixels = inputs["pixel_values"]
    if pixels.shape != own.shape or (pixels - own).abs().max() > _PIXELS:
        raise _failed("its image processor does not give the graft's pixels")


def _failed(reason: str) -> MMGraftError:
    return MMGraftError(
        f"the exported model is not the graft's: {reason}. Nothing was kept of it. Use --to full "
        "for one folder that mmgraft loads, and please report the base and tower."
    )
