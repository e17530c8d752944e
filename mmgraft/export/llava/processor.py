"""The stock processor of an exported model: pixels, tokens and template as the graft has them.

Its chat template is the graft's own, behind lines that place the images: ``parts.jinja`` and
``plain.jinja``, in which words in capitals are filled in here.
"""

import copy
import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AddedToken, AutoImageProcessor, LlavaProcessor, PreTrainedTokenizerBase

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template, reads_parts
from mmgraft.data.chat.transcript import STOCK_SENTINEL
from mmgraft.errors import UsageError
from mmgraft.export.llava.config import select_strategy
from mmgraft.export.llava.fit import Ingredients
from mmgraft.frozen import Frozen
from mmgraft.model.files.load import load_processor
from mmgraft.vision.preprocessing import SquareResize

_OTHER_TOKENS = ("[image]", "<|mmgraft_image|>")
_PLAIN_WITHOUT_END = (
    "{{- raise_exception('plain text ends an answer with the end-of-sequence token, and this "
    "tokenizer has none') -}}"
)


class StockProcessor(Frozen):
    """The processor to save, and what the model must know of it.

    Attributes:
        processor: Transformers' own, with the image token in its tokenizer.
        image_token_id: The id of an image position.
        new_rows: Ids past the base's embedding, up to and with the image token's.
        graft: Mmgraft's processor of the same graft.
    """

    processor: LlavaProcessor
    image_token_id: int
    new_rows: range
    graft: GraftProcessor


def stock_processor(made_of: Ingredients) -> StockProcessor:
    """Make the processor of an exported model.

    Raises:
        UsageError: The base has no tokenizer, or the tower's pixels cannot be made by transformers.
    """
    tower = made_of.tower
    graft = load_processor(made_of.record, made_of.files.path, tower)
    tokenizer, token = image_tokenizer(graft.tokenizer, graft.template)
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    processor = LlavaProcessor(
        image_processor=image_processor(made_of),
        tokenizer=tokenizer,
        patch_size=_patch_size(made_of),
        vision_feature_select_strategy=select_strategy(made_of),
        num_additional_image_tokens=tower.feature_map.prefix,
        image_token=token,
        chat_template=tokenizer.chat_template,
    )
    rows = made_of.anatomy.vocab_size
    return StockProcessor(processor, index, range(rows, max(rows, index + 1)), graft)


def image_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[PreTrainedTokenizerBase, str]:
    """Return a copy of the base's tokenizer that knows an image position and the graft's template.

    Args:
        tokenizer: The base's; it is not changed.
        template: The graft's.

    Returns:
        The copy, and the text of its new token.
    """
    known = set(tokenizer.get_vocab())
    token = next(text for text in (STOCK_SENTINEL, *_OTHER_TOKENS) if text not in known)
    clone = copy.deepcopy(tokenizer)
    clone.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    clone.chat_template = image_template(template, tokenizer, token)
    clone.padding_side = clone.init_kwargs["padding_side"] = "left"  # for answers in batches
    if clone.pad_token is None:
        clone.pad_token = clone.eos_token
    if template.kind != "plain" and _adds_to(clone):
        for name in ("add_bos_token", "add_eos_token"):
            setattr(clone, name, False)
            clone.init_kwargs[name] = False
    for name in ("is_local", "local_files_only"):  # of this machine
        clone.init_kwargs.pop(name, None)
    return clone, token


def _adds_to(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a processor would put special tokens around what the template has written.

    It does so where the tokenizer does, unless the text begins with the token that begins texts.
    """
    if tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]:
        return False
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return True
    return not tokenizer.bos_token or not str(text).startswith(str(tokenizer.bos_token))


def _patch_size(made_of: Ingredients) -> int:
    """Return the number by which LlavaProcessor divides an image's sides to count its positions."""
    tower = made_of.tower
    height, width = tower.image_size
    size = height // tower.feature_map.grid[0]
    if (height // size) * (width // size) != tower.num_patches:
        raise UsageError(
            f"the vision tower {tower.spec.name} gives {tower.num_patches} positions for "
            f"{height} x {width} pixels, which no patch size that LLaVA knows explains. "
            "Use --to full for one folder that mmgraft loads."
        )
    return size


def image_processor(made_of: Ingredients) -> Any:
    """Return the tower's own image processor, or one that does what its options say."""
    tower = made_of.tower
    if tower.image_processor is not None:
        return tower.image_processor
    plain = tower.preprocessing
    assert isinstance(plain, SquareResize)
    height, width = plain.image_size
    values = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": height, "width": width},
        "resample": plain.resample.value,
        "rescale_factor": plain.scale,
        "image_mean": list(plain.mean),
        "image_std": list(plain.std),
        "do_convert_rgb": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(values))
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


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
        return _flatten(image_token, every=True) + plain_template(tokenizer, image_token)
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


def plain_template(tokenizer: PreTrainedTokenizerBase, *images: str) -> str:
    """Plain text. What the tokenizer puts before a text of its own accord, it puts there itself."""
    end = tokenizer.eos_token
    walls = [*images, *([str(end)] if end else [])]
    text = _read("plain.jinja").replace("WALLS", json.dumps(walls))
    if end:
        return text.replace("END", json.dumps(str(end)))
    return text.replace("{%- set all.text = all.text + END -%}", _PLAIN_WITHOUT_END)
