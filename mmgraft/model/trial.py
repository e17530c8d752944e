"""Try a method on a small random copy of a base, before a graft of it is written.

What a class does with embeddings, padding and a cache cannot all be read from its code. Here a copy
with few layers runs for a moment what a graft promises: the reason for a refusal is what was seen.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from mmgraft.anatomy import Anatomy, examine, shrunken
from mmgraft.basefiles.parts import quiet
from mmgraft.grafts.method import Method
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import BaseReference, TemplateChoice
from mmgraft.model.files.parts import LoadedParts, make_workflow
from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.configs import MlpConfig

_FAR = 1e-3  # of the logits' own size: rounding is below, a mistake above
_LENGTH, _PAD, _NEW = 24, 7, 3
_OF_FILES = ("quantization_config", "dtype", "transformers_version", "_name_or_path")


def refusal(method: Method, anatomy: Anatomy, base: PreTrainedModel) -> str | None:
    """Return the reason why a base cannot take a method, or None where it can.

    Args:
        method: The method.
        anatomy: The base's.
        base: The base, loaded or its skeleton.
    """
    if "layers" in method.config_class.model_fields and len(anatomy.blocked) == anatomy.num_layers:
        return f"no layer can carry a graft: {anatomy.blocked[0]}"
    if reason := method.refuses(anatomy):
        return reason
    try:
        small = shrunken(base.config)
    except Exception:  # no copy can be made of it: what is left is the examination
        return None
    values = {name: value for name, value in small.to_dict().items() if name not in _OF_FILES}
    text = json.dumps(values, sort_keys=True, default=str)
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        return _refusal(method.name, type(base), type(small), text)


@cache
def _refusal(
    name: str, kind: type[PreTrainedModel], of: type[PreTrainedConfig], values: str
) -> str | None:
    """Return what is wrong with two copies: rounding sends a token to another expert at times."""
    reason = None
    for seed in (0, 1):
        torch.manual_seed(seed)
        try:
            base = kind._from_config(of.from_dict(json.loads(values)), dtype=torch.float32).eval()
        except Exception:  # as above
            return None
        reason = _tried(get_method(name), base)
        if reason is None:
            break
    return reason


def _tried(method: Method, base: PreTrainedModel) -> str | None:
    _randomise(base)
    trial = _Trial(base)
    try:
        off = next((found for found in trial.findings(method) if found), None)
    except Exception as error:  # whatever a foreign class may raise
        off = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if off is None:
        return None
    return f"{trial.what} (a small random copy of {type(base).__name__} was tried: {off})"


def _randomise(base: nn.Module) -> None:
    """Draw weights so large that every part of a copy speaks."""
    for name, parameter in base.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() < 2 or "norm" in name:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * (0.25 if "emb" in name else parameter.shape[-1] ** -0.5))


def _grafted(method: Method, base: PreTrainedModel) -> Any:
    """Graft with the method's own settings on all layers that can carry; None where that cannot be
    tried.
    """
    from mmgraft.model.files.load import finish
    from mmgraft.model.modeling import GraftedModel

    anatomy, fields = examine(base), method.config_class.model_fields
    free = [index for index in range(anatomy.num_layers) if index not in anatomy.blocked]
    # A copy is narrower than its base.
    settings = {"layers": free, "norm": anatomy.norm_path is not None, "rank": 4}
    own = {name for name, one in fields.items() if one.default is not None}
    given: dict[str, Any] = {name: value for name, value in settings.items() if name in own}
    needed = {name for name, one in fields.items() if one.is_required()}
    too_long = 0 < (anatomy.max_positions or 0) < 2 * _LENGTH
    if needed - given.keys() or too_long or not given.get("layers", True):
        return None
    config = method.config_class.model_validate(given)
    kept = method.promises(config)
    if any((kept.cache, kept.neighbours, kept.causal, kept.padding)):
        return None
    parts, copy = LoadedParts(base, anatomy), BaseReference(id="copy")
    template = TemplateChoice()
    made = make_workflow(config, anatomy, parts, "mm", MlpConfig(), None, copy, None, template)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    finish(made, base, anatomy)
    return GraftedModel(base, None, [made], anatomy)


class _Trial:
    """A row with an image and a longer one of text, in all ways that must give the same.

    Attributes:
        what: What is wrong if the next finding is not None.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base, self.what = base, "a graft on it fails"
        most = len(cast(nn.Embedding, base.get_input_embeddings()).weight)
        ids = torch.arange(_LENGTH)[None] * 7 % min(most, 200)
        self.image = {"input_ids": ids, "attention_mask": ids * 0 + 1}
        self.text = torch.arange(_LENGTH + _PAD)[None] * 5 % min(most, 200)

    def both(self, before: int, after: int) -> dict[str, Tensor]:
        """Return a batch of both rows, the one with the image padded."""
        long = (self.text, self.text * 0 + 1, self.text * 0)
        pairs = zip(self.image.items(), long, strict=True)
        return {name: torch.cat([F.pad(row, (before, after)), two]) for (name, row), two in pairs}

    def logits(self, given: dict[str, Tensor]) -> Tensor:
        """Return those of a full forward."""
        return self.model(**given, image_features=self.features, use_cache=False).logits

    def findings(self, method: Method) -> Iterator[str | None]:
        """Yield how far off the copy is; None where it is right."""
        self.model = _grafted(method, self.base)
        if self.model is None:
            return
        workflow = self.model.workflow()
        places = workflow.positions(Plan.of_count(4))
        images = max(1, 4 // places)  # where one has one position, several are alike
        self.features = torch.randn(images, 4, workflow.projector.in_features)
        shown = torch.ones(1, images * places, dtype=torch.long)
        self.image["mm_token_type_ids"] = F.pad(shown, (2, _LENGTH - 2 - shown.shape[1]))
        self.what = "it reads token ids beside embeddings, and an image has none"
        text = self.base(input_ids=self.text, use_cache=False).logits
        embeds = self.base.get_input_embeddings()(self.text)
        yield _off(self.base(inputs_embeds=embeds, use_cache=False).logits, text)
        self.what = "a row with an image fails"
        whole = self.logits(self.image)
        self.what = "a later token changes earlier logits"
        ids = self.image["input_ids"]
        later = {**self.image, "input_ids": torch.cat([ids[:, :-1], ids[:, -2:-1]], dim=1)}
        yield _off(self.logits(later)[:, :-1], whole[:, :-1])
        for side, (before, after) in {"right": (0, _PAD), "left": (_PAD, 0)}.items():
            self.what = f"padding on the {side} changes a row's logits"
            found = self.logits(self.both(before, after))
            yield _off(found[:1, before : before + _LENGTH], whole) or _off(found[1:], text)
        self.what = "decoding with a cache differs from the full forward"
        yield self.cached(self.image)
        self.what += " where a row is padded"
        yield self.cached(self.both(_PAD, 0))
        self.what = "generating differs from the full forward"
        yield self.generated(self.both(_PAD, 0))
        self.what = "its loss is not that of its logits"
        yield self.trained()

    def cached(self, given: dict[str, Tensor]) -> str | None:
        """Compare a first part, a chunk and single tokens with the full forward."""
        end, found, past, start = given["input_ids"].shape[1], [], None, 0
        for stop in (end - 10, end - 6, *range(end - 3, end + 1)):
            new = {name: tensor[:, start:stop] for name, tensor in given.items()}
            new["attention_mask"] = given["attention_mask"][:, :stop]
            images = {} if start else {"image_features": self.features}
            out = self.model(**new, **images, past_key_values=past, use_cache=True)
            past, start = getattr(out, "past_key_values", None), stop
            if past is None:
                return "it returns no past_key_values"
            found.append(out.logits)
        real = given["attention_mask"].bool()
        return _off(torch.cat(found, 1)[real], self.logits(given)[real])

    def generated(self, given: dict[str, Tensor]) -> str | None:
        """Compare the logits of greedy steps with the full forward's."""
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        counts = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "pad_token_id": 0}
        made = self.model.generate(**given, image_features=self.features, **options, **counts)
        new = made.sequences[:, -_NEW:]
        ends = dict(zip(given, (new, new * 0 + 1, new * 0), strict=True))
        full = self.logits({name: torch.cat([given[name], ends[name]], 1) for name in given})
        return _off(torch.stack(made.logits, 1), full[:, -_NEW - 1 : -1])

    @torch.enable_grad()
    def trained(self) -> str | None:
        """Compare the loss with that of the logits, and ask for a gradient."""
        self.model.set_trainable(["projector"])
        labels = self.image["input_ids"].masked_fill(self.image["mm_token_type_ids"] == 1, -100)
        loss = self.model(**self.image, image_features=self.features, labels=labels).loss
        torch.autograd.grad(loss, list(self.model.workflow().projector.parameters()))
        wanted = F.cross_entropy(self.logits(self.image)[0, :-1], labels[0, 1:])
        return _off(loss.detach(), wanted.detach())


def _off(one: Tensor, other: Tensor) -> str | None:
    far, size = (one - other).abs().max().item(), other.abs().max().item()
    return None if far <= _FAR * max(size, 1.0) else f"off by {far:.2g} of {size:.2g}"
