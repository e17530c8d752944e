"""A grafted model as lm-evaluation-harness sees one. Needs the extra ``mmgraft[eval]``."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models import hf_vlms, huggingface
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.run_features import image_inputs
from mmgraft.inference import Answerer
from mmgraft.model.generation import neutral

HFLM: Any = huggingface.HFLM  # their decorators hide what these classes are
HFMultimodalLM: Any = hf_vlms.HFMultimodalLM

# A loaded model is what this package always gives, and no reason for a warning.
logging.getLogger("lm_eval.models.huggingface").addFilter(
    lambda record: "`pretrained` model kwarg" not in record.getMessage()
)

#: Placeholder of an image in a task of lm-evaluation-harness.
PLACEHOLDER = "<image>"


def plain_lm(base: PreTrainedModel, processor: GraftProcessor, batch_size: int) -> Any:
    """Return the harness's own ``hf`` model of a base, prompted as the graft's text workflow is."""
    return PlainLM(**_settings(base, processor, batch_size))


class PlainLM(HFLM):
    """The harness's ``hf`` model, without what the base's own generation config says."""

    def _model_generate(self, *args: Any, **generation_kwargs: Any) -> Tensor:
        with neutral(self.model):
            return super()._model_generate(*args, **generation_kwargs)


class TextLM(HFLM):
    """A grafted model's text rows: ``hf`` on the base, except that the graft's forward runs them.

    What the harness reads from a model (its context length, its prefix token) it reads from the
    base.

    Args:
        answerer: Model and processor.
        workflow: Of all rows: ``text``, or one that sees, run without an image.
        batch_size: Rows a batch.
    """

    def __init__(self, answerer: Answerer, workflow: str, batch_size: int) -> None:
        super().__init__(**_settings(answerer.model.base, answerer.processor, batch_size))
        self._max_length = self.max_length
        self._model = answerer.model
        self._workflow = workflow

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            return self.model(inps, workflow=self._workflow).logits  # (b, s, vocab)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        generation_kwargs["workflow"] = self._workflow
        # Plain text ends where the base ends it, not where a template's turn does.
        generation_kwargs["eos_token_id"] = self.model.generation_config.eos_token_id
        with self.model.greedy():
            return super()._model_generate(context, max_length, stop, **generation_kwargs)


class ImageLM(HFMultimodalLM):
    """A grafted model's rows with images: ``hf-multimodal``, tokenised by the graft's processor.

    The harness knows prompts as texts: here they are chats, written as JSON until the images are
    there and the processor's own template is applied.

    Args:
        answerer: Model and processor.
        workflow: Of all rows.
        batch_size: Rows a batch.
    """

    def __init__(self, answerer: Answerer, workflow: str, batch_size: int) -> None:
        self._graft_processor = answerer.processor
        settings = _settings(answerer.model.base, answerer.processor, batch_size)
        super().__init__(image_string=PLACEHOLDER, **settings)
        self._max_length = self.max_length
        self._model = answerer.model
        self._workflow = workflow

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *_: Any, **__: Any) -> None:
        self.tokenizer, self.processor = tokenizer, self._graft_processor

    def _model_multimodal_generate(self, *args: Any, **generation_kwargs: Any) -> Tensor:
        with self.model.greedy():
            return super()._model_multimodal_generate(*args, **generation_kwargs)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens and isinstance(tokens, list):
            return self._graft_processor.answer(tokens)
        return super().tok_decode(tokens, skip_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not add_generation_prompt:
            raise UsageError(
                "the task begins the answer itself (gen_prefix), which prompts with images cannot; "
                "move that text to the end of its doc_to_text"
            )
        return json.dumps(chat_history, ensure_ascii=False)

    def tok_batch_multimodal_encode(
        self,
        strings: list[str],
        images: list[list[Any]],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> dict[str, Any]:
        processor = self._graft_processor
        rows = [
            processor.encode(_with_images(json.loads(text), shown))
            for text, shown in zip(strings, images, strict=True)
        ]
        longest = max(map(len, rows))
        if left_truncate_len and longest > left_truncate_len:
            raise UsageError(
                f"a prompt has {longest} tokens, and {left_truncate_len} fit beside the answer; "
                "lower max_gen_toks in the task's generation_kwargs, or its num_fewshot"
            )
        inputs = {
            name: one.to(self.device) for name, one in processor.collate(rows, "left").items()
        }
        names = ["an image of a task"] * len(rows)
        images_of_all = image_inputs(torch.device(self.device), processor, rows, None, names)
        return {**inputs, **images_of_all, "workflow": self._workflow}


def _settings(base: PreTrainedModel, processor: GraftProcessor, batch_size: int) -> dict[str, Any]:
    """Return what every model of the harness is made with."""
    return {
        "pretrained": base,
        "backend": "causal",
        "tokenizer": _tokenizer(processor),
        "chat_template_args": dict(processor.options),
        "batch_size": batch_size,
    }


def _tokenizer(processor: GraftProcessor) -> PreTrainedTokenizerBase:
    """Return a copy with the graft's template, because the harness may add a padding token."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    if processor.template.text is not None:
        tokenizer.chat_template = processor.template.text
    return tokenizer


def _with_images(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any]
) -> list[Mapping[str, Any]]:
    """Return messages whose placeholders are image parts, in order."""
    found = sum(str(message["content"]).count(PLACEHOLDER) for message in messages)
    if found != len(images):
        raise UsageError(
            f"a prompt says {PLACEHOLDER} {found} times and has {len(images)} images; let the "
            f"task's doc_to_text write {PLACEHOLDER} once for each image of its doc_to_image"
        )
    queue = iter(images)
    made: list[Mapping[str, Any]] = []
    for message in messages:
        first, *rest = str(message["content"]).split(PLACEHOLDER)
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
        for piece in rest:
            parts.append({"type": "image", "image": next(queue)})
            parts += [{"type": "text", "text": piece}] if piece else []
        made.append({**message, "content": parts if rest else first})
    return made
