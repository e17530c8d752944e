"""Log-probabilities of texts that go on from a context, in batches, each context read once.

Multiple choice is scored by them: the option that a model finds likeliest after the question.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from string import ascii_uppercase
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mmgraft.data.batches.sequences import Side, pad
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.chat.transcript import MARKER, Transcript
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.run_features import Features, image_inputs
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.metrics.answers import ChoiceScore
from mmgraft.frozen import Frozen
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW

#: Context length of a base that names none, as in lm-evaluation-harness.
DEFAULT_LENGTH = 2048

_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
_UNSET = 1e29  # transformers' own word for a tokenizer without a length
#: Types of layers that go on from a cache as if all were read at once.
PLAIN_LAYERS = {"full_attention", "sliding_attention"}
#: Logits that one pass may give; a batch is made smaller until it fits.
LOGITS_AT_ONCE = 1 << 27


class Request(Frozen):
    """A context and what may follow it.

    Attributes:
        context: At least one id, with the images among them.
        continuations: Ids of each, at least one.
    """

    context: Encoded
    continuations: Sequence[Sequence[int]]

    @property
    def longest(self) -> int:
        """Positions of the longest row that the model reads; the last id is only predicted."""
        return len(self.context) + max(map(len, self.continuations)) - 1


class Likelihoods:
    """Computes log-probabilities with one model and one workflow.

    A context is read once into a cache, and its continuations go on from there. Where a cache would
    not give what a full pass gives, each continuation is read with its context.

    Args:
        model: A grafted model, or a stock causal LM, in eval mode.
        processor: The grafted model's; it pads rows and makes images into tensors.
        workflow: Of all rows, for a grafted model.
        features: The tower's features of image files; by default images are opened and run through
            the tower.
    """

    def __init__(
        self,
        model: GraftedModel | PreTrainedModel,
        processor: GraftProcessor,
        workflow: str = TEXT_WORKFLOW,
        features: Features | None = None,
    ) -> None:
        self.model, self.processor, self.workflow = model, processor, workflow
        self.features = features
        base = model.base if isinstance(model, GraftedModel) else model
        self.config: Any = base.config
        self.length = context_length(self.config, processor.tokenizer)
        self._takes_positions = (
            "position_ids" in inspect.signature(base.base_model.forward).parameters
        )
        self.share = self._cacheable()

    def batches(self, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
        """Return indices of requests in batches of like length, the longest first.

        A batch has ``batch_size`` requests at most, and as few as its logits ask for.
        """
        sizes = []
        for request in requests:
            width = max(map(len, request.continuations)) if self.share else request.longest
            sizes.append((request.longest, len(request.continuations), width))
        return batches(sizes, batch_size, positions_at_once(self.config))

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        """Return each continuation's log-probability after its context, in nats.

        A row longer than the model's context length loses its prefix, as in
        lm-evaluation-harness.
        """
        if self.share and max(request.longest for request in requests) <= self.length:
            return self._shared(requests)
        return self._whole(requests)

    # -- the two ways ---------------------------------------------------------------------------

    def _shared(self, requests: Sequence[Request]) -> list[list[float]]:
        contexts = [request.context for request in requests]
        ids, mask = self._padded([context.input_ids for context in contexts], "left")
        kinds = pad([context.kinds for context in contexts], 0, "left")
        kinds = kinds.to(mask.device, non_blocking=True)
        cache = DynamicCache(config=self.config)
        cached: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        images = self._images(contexts)
        logits = self._forward(
            ids, mask, kinds, images, logits_to_keep=1, **cached
        )  # (b, 1, vocab)
        first = logits[:, -1].float().log_softmax(-1)  # (b, vocab)
        every = [(row, each) for row, one in enumerate(requests) for each in one.continuations]
        chosen = there([[row, each[0]] for row, each in every], first.device)
        sums = first[chosen[:, 0], chosen[:, 1]].double()
        longer = [at for at, (_, each) in enumerate(every) if len(each) > 1]
        if longer:
            rows = [list(every[at][1]) for at in longer]
            owners = there([every[at][0] for at in longer], mask.device)
            cache.batch_select_indices(owners)
            given, real = self._padded([row[:-1] for row in rows], "right")
            both = torch.cat([mask[owners], real], dim=1)
            logits = self._forward(given, both, torch.zeros_like(given), {}, **cached)
            parts = [each[: len(ids) - 1] for ids, each in zip(rows, logits, strict=True)]
            sums[there(longer, sums.device)] += _sums(parts, [ids[1:] for ids in rows])
        found = iter(sums.tolist())  # a card is waited for once
        return [[next(found) for _ in request.continuations] for request in requests]

    def _whole(self, requests: Sequence[Request]) -> list[list[float]]:
        """Score every continuation with its context."""
        rows, kinds, starts, wanted, owners = [], [], [], [], []
        for request in requests:
            context = request.context
            for each in request.continuations:
                cut = max(0, len(context) + len(each) - 1 - self.length)
                rows.append([*context.input_ids, *each][cut:-1])
                kinds.append([*context.kinds, *([0] * (len(each) - 1))][cut:])
                starts.append(len(rows[-1]) - len(each))
                wanted.append(each)
                owners.append(context)
        ids, mask = self._padded(rows, "right")
        kinds_of_all = pad(kinds, 0, "right").to(mask.device, non_blocking=True)
        logits = self._forward(ids, mask, kinds_of_all, self._images(owners), use_cache=False)
        parts = [
            each[start : start + len(ids)]
            for each, start, ids in zip(logits, starts, wanted, strict=True)
        ]
        sums = iter(_sums(parts, wanted).tolist())
        return [[next(sums) for _ in request.continuations] for request in requests]

    # -- steps ----------------------------------------------------------------------------------

    def _forward(
        self, ids: Tensor, mask: Tensor, kinds: Tensor, images: dict[str, Tensor], **options: Any
    ) -> Tensor:
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **images, **options}
        if self._takes_positions:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if isinstance(self.model, GraftedModel):
            given["workflow"] = self.workflow
            if self.workflow != TEXT_WORKFLOW:
                given["mm_token_type_ids"] = kinds
        run: Callable[..., Any] = self.model
        return run(**given).logits  # (b, s, vocab)

    def _images(self, contexts: Sequence[Encoded]) -> dict[str, Tensor]:
        names = ["a question"] * len(contexts)
        return image_inputs(self.model.device, self.processor, contexts, self.features, names)

    def _padded(self, rows: Sequence[Sequence[int]], side: Side) -> tuple[Tensor, Tensor]:
        """Return ids and mask of rows."""
        both = (
            pad(rows, self.processor.pad_id, side),
            pad([[1] * len(row) for row in rows], 0, side),
        )
        ids, mask = (one.to(self.model.device, non_blocking=True) for one in both)
        return ids, mask

    def _cacheable(self) -> bool:
        if isinstance(self.model, GraftedModel) and self.workflow != TEXT_WORKFLOW:
            cached = not self.model.workflow(self.workflow).graft.promises.cache
            return cached and can_go_on(self.config)
        return can_go_on(self.config)


def batches(sizes: Sequence[tuple[int, int, int]], batch_size: int, most: int) -> list[list[int]]:
    """Return indices in batches of like length, the longest first.

    Args:
        sizes: Length of each, its rows, and for how many positions of a row logits are computed.
        batch_size: The most indices of a batch.
        most: The most positions of a batch, rows being padded to the widest.
    """
    made: list[list[int]] = []
    rows = width = 0
    for at in sorted(range(len(sizes)), key=lambda at: (-sizes[at][0], at)):
        _, more, own = sizes[at]
        width = max(width, own)
        if not made or len(made[-1]) == batch_size or (rows + more) * width > most:
            made.append([])
            rows, width = 0, own
        made[-1].append(at)
        rows += more
    return made


def positions_at_once(config: Any) -> int:
    """Return at how many positions one pass may compute logits."""
    return max(1, LOGITS_AT_ONCE // int(config.get_text_config().vocab_size))


def can_go_on(config: Any) -> bool:
    """Return whether a base that goes on from a cache gives what a full pass gives."""
    types = getattr(config.get_text_config(), "layer_types", None)
    return types is None or PLAIN_LAYERS.issuperset(types)


def context_length(config: Any, tokenizer: Any = None) -> int:
    """Return the positions that a model reads at most, found as lm-evaluation-harness does."""
    text = getattr(config, "text_config", None) or config
    for name in _LENGTHS:
        value = getattr(text, name, None)
        if value is not None:
            return int(value)
    value = getattr(tokenizer, "model_max_length", None)
    return DEFAULT_LENGTH if value is None or value > _UNSET else int(value)


def prefix_id(tokenizer: Any) -> int:
    """Return what stands before a text without context: beginning of sequence, else its end."""
    found = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if found is None else found)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return a text's ids with the special tokens that the tokenizer adds.

    A text that contains the beginning of sequence itself does not get another.
    """
    says = text.startswith(tokenizer.decode(prefix_id(tokenizer)))
    return list(tokenizer.encode(text, **({"add_special_tokens": False} if says else {})))


def there(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return whole numbers on a device, which is not waited for."""
    return torch.tensor(values).to(device, non_blocking=True)


def _sums(logits: Sequence[Tensor], ids: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-probability of each row's ids, from the logits before them ``(n, vocab)``.

    Ids go to a card together, and it is not waited for.
    """
    wanted = there([one for row in ids for one in row], logits[0].device)
    parts = zip(logits, wanted.split([len(row) for row in ids]), strict=True)
    sums = [
        each.float().log_softmax(-1).gather(-1, own[:, None]).double().sum() for each, own in parts
    ]
    return torch.stack(sums)


def score_choices(
    model: GraftedModel | PreTrainedModel,
    processor: GraftProcessor,
    items: Sequence[Item],
    *,
    workflow: str | None = None,
    chat: bool = True,
    letters: bool = False,
    batch_size: int = 16,
    features: Features | None = None,
    on_result: Callable[[Sequence[int], Sequence[ChoiceScore]], None] = lambda at, scores: None,
) -> list[ChoiceScore]:
    """Compute log-probabilities of every option of every item, in order.

    Args:
        model: A grafted model, or a base by itself.
        processor: The grafted model's.
        items: Items with options.
        workflow: Of all rows; by default items with an image run the model's and others ``text``.
        chat: Apply the processor's template; else question, space and option are one plain text.
        letters: Score "A", "B", ... instead of the options' texts.
        batch_size: Items a batch, of like length.
        features: The tower's features of image files; by default the tower computes them.
        on_result: Called with the indices and the scores of each batch as it ends.

    Raises:
        UsageError: An item that cannot be written so; an unknown workflow.
    """
    options = [ascii_uppercase[: len(one.options)] if letters else one.options for one in items]
    pairs = zip(items, options, strict=True)
    requests = [_request(processor, item, texts, chat) for item, texts in pairs]
    found: dict[int, ChoiceScore] = {}
    for name, chosen in _by_workflow(model, items, workflow):
        likelihoods = Likelihoods(model, processor, name, features)
        for at in chosen:
            _refuse_long(items[at], requests[at], likelihoods.length)
        for batch in likelihoods.batches([requests[at] for at in chosen], batch_size):
            indices = [chosen[one] for one in batch]
            sums = likelihoods.score([requests[at] for at in indices])
            for at, one in zip(indices, sums, strict=True):
                tokens = tuple(map(len, requests[at].continuations))
                characters = tuple(map(len, options[at]))
                found[at] = ChoiceScore(items[at].id, tuple(one), tokens, characters)
            on_result(indices, [found[at] for at in indices])
    return [found[at] for at in range(len(items))]


def _by_workflow(
    model: GraftedModel | PreTrainedModel, items: Sequence[Item], workflow: str | None
) -> Iterator[tuple[str, list[int]]]:
    """Yield the workflow of items with images, and of those without, with their indices."""
    sees = workflow
    if isinstance(model, GraftedModel) and workflow != TEXT_WORKFLOW:
        sees = model.workflow(workflow).name
    for with_images, name in ((True, sees), (False, workflow)):
        chosen = [at for at, item in enumerate(items) if item.has_image is with_images]
        if chosen:
            yield name or TEXT_WORKFLOW, chosen


def _refuse_long(item: Item, request: Request, length: int) -> None:
    longest = request.longest
    if request.context.images and longest > length:
        raise UsageError(
            f"{item.where}: the question has {longest} positions with its images and an option, "
            f"and the base reads {length}; shorten it, or leave it out"
        )


# -- questions as ids ---------------------------------------------------------------------------


def _request(processor: GraftProcessor, item: Item, texts: Sequence[str], chat: bool) -> Request:
    request = (_chat if chat else _plain)(processor, item, texts)
    for text, ids in zip(texts, request.continuations, strict=True):
        processor.check_ids([*request.context.input_ids, *ids], item.where)
        if not ids:
            raise UsageError(
                f"{item.where}: the option {text!r} adds no token to the question; write another"
            )
    return request


def _plain(processor: GraftProcessor, item: Item, texts: Sequence[str]) -> Request:
    """Write question and options as one text each, cut where the question's own ids end.

    Spaces at the question's end belong to the options. Source: lm-evaluation-harness, how it
    encodes a context and a continuation.
    """
    if item.has_image or len(item.messages) != 1:
        raise UsageError(
            f"{item.where}: {'an image' if item.has_image else 'several turns'} cannot be written "
            "as plain text; use the chat template (chat: true in a set of text)"
        )
    tokenizer = processor.tokenizer
    question = str(item.messages[0]["content"])
    stripped = question.rstrip()
    gap = question[len(stripped) :]
    if not stripped:
        wholes = [tokenizer.encode(f"{gap} {text}", add_special_tokens=False) for text in texts]
        return Request(Encoded([prefix_id(tokenizer)], [0], []), wholes)
    context = plain_ids(tokenizer, stripped)
    wholes = [plain_ids(tokenizer, f"{stripped}{gap} {text}") for text in texts]
    encoded = Encoded(context, [0] * len(context), [])
    return Request(encoded, [whole[len(context) :] for whole in wholes])


def _chat(processor: GraftProcessor, item: Item, texts: Sequence[str]) -> Request:
    """Write the conversation up to the answer, and each option as the answer's first ids."""
    messages = [dict(message) for message in item.messages]
    transcript = processor.transcript(messages, item.tools, item.where)
    prompt = transcript.render(add_generation_prompt=True)
    context = transcript.ids(prompt)
    gap = _gap(transcript, prompt)
    wholes = [transcript.ids(f"{prompt}{gap}{text}")[len(context) :] for text in texts]
    return Request(processor.expand(transcript, context), wholes)


def _gap(transcript: Transcript, prompt: str) -> str:
    """Return what the template writes between the answer's header and the answer."""
    answer = {"role": "assistant", "content": MARKER}
    whole = transcript.render([*transcript.messages, answer])
    at = whole.find(MARKER, len(prompt))
    return whole[len(prompt) : at] if at >= 0 and whole.startswith(prompt) else ""
