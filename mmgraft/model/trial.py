"""Try a method on a small random copy of a base, before a graft of it is written.

What a class does with embeddings, padding and a cache cannot all be read from its code. Here a copy
with few layers runs for a moment what a graft promises: the reason for a refusal is what was seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from mmgraft.anatomy import Anatomy, examine, shrunken
from mmgraft.errors import UsageError
from mmgraft.grafts.method import Method
from mmgraft.grafts.registry import get_method
from mmgraft.vision.projectors.configs import MlpConfig

_FAR = 1e-3  # of the logits' own size: rounding is below, a mistake above
_LENGTH, _PAD = 24, 7


def refusal(method: Method, anatomy: Anatomy, base: PreTrainedModel) -> str | None:
    """Return the reason why a base cannot take a method, or None where it can.

    Args:
        method: The method.
        anatomy: The base's.
        base: The base, loaded or its skeleton.
    """
    if "layers" in method.config_class.model_fields and len(anatomy.blocked) == anatomy.num_layers:
        return f"no layer can carry a graft: {anatomy.blocked[0]}"
    reason = method.refuses(anatomy)
    if reason is not None:
        return reason
    try:
        small = shrunken(base.config)
        values = small.to_dict()
    except Exception:  # no copy can be made of it: what is left is the examination
        return None
    for name in ("quantization_config", "dtype", "transformers_version", "_name_or_path"):
        values.pop(name, None)
    text = json.dumps(values, sort_keys=True, default=str)
    return _refusal(method.name, type(base), type(small), text)


@cache
def _refusal(
    name: str, kind: type[PreTrainedModel], of: type[PreTrainedConfig], values: str
) -> str | None:
    """Return what one copy and then another break.

    Twice, for rounding sends a token to another expert once in a while.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        method = get_method(name)
        reason = _tried(method, kind, of.from_dict(json.loads(values)), seed=0)
        return reason and _tried(method, kind, of.from_dict(json.loads(values)), seed=1)


def _tried(
    method: Method, kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int
) -> str | None:
    torch.manual_seed(seed)
    try:
        base = kind._from_config(config, dtype=torch.float32).eval()
    except Exception:  # as above
        return None
    _randomise(base)
    what: str = "a graft on it fails"
    try:
        model = _grafted(method, base)
        for what, check in [] if model is None else _Trial(base, model).checks():  # noqa: B007
            if off := check():
                break
        else:
            return None
    except UsageError as error:
        return str(error)
    except Exception as error:  # whatever a foreign class may raise
        off = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return f"{what} (a small random copy of {type(base).__name__} was tried: {off})"


def _randomise(base: nn.Module) -> None:
    """Draw weights so large that every part of a copy speaks."""
    for name, parameter in base.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() < 2 or "norm" in name:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * (0.25 if "emb" in name else parameter.shape[-1] ** -0.5))


def _grafted(method: Method, base: PreTrainedModel) -> Any:
    """Graft with the method's own settings on all layers that can carry; None where none can."""
    from mmgraft.model.files.create import make_on_loaded
    from mmgraft.model.files.load import finish
    from mmgraft.model.modeling import GraftedModel

    anatomy, fields = examine(base), method.config_class.model_fields
    free = [index for index in range(anatomy.num_layers) if index not in anatomy.blocked]
    given: dict[str, Any] = {"layers": free} if "layers" in fields else {}
    if "norm" in fields:
        given["norm"] = anatomy.norm_path is not None
    if "rank" in fields:  # a copy is narrower than its base
        given["rank"] = 4
    needed = {name for name, one in fields.items() if one.is_required()}
    if needed - given.keys() or not given.get("layers", [0]):
        return None
    settings = method.config_class.model_validate(given)
    kept = method.promises(settings)
    if any((kept.cache, kept.neighbours, kept.causal, kept.padding)):
        return None
    made = make_on_loaded(base, anatomy, settings, "mm", MlpConfig(), None, None, None, tried=True)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    finish(made, base, anatomy)
    return GraftedModel(base, None, [made], anatomy)


class _Trial:
    """A row with an image and a longer one of text, in all ways that must give the same."""

    def __init__(self, base: PreTrainedModel, model: Any) -> None:
        self.base, self.model = base, model
        width = model.workflow().projector.in_features
        self.features = torch.linspace(-1, 1, 4 * width).view(1, 4, width)
        kinds = F.pad(torch.ones(1, 4, dtype=torch.long), (2, _LENGTH - 6))
        ids = torch.arange(_LENGTH)[None] * 7 % 200 + 20
        self.image = {"input_ids": ids, "attention_mask": ids * 0 + 1, "mm_token_type_ids": kinds}
        self.text = torch.arange(_LENGTH + _PAD)[None] * 5 % 200 + 20

    def both(self, gap: tuple[int, int]) -> dict[str, Tensor]:
        """Return a batch of both rows, the one with the image padded."""
        long = (self.text, self.text * 0 + 1, self.text * 0)
        pairs = zip(self.image.items(), long, strict=True)
        return {name: torch.cat([F.pad(row, gap), other]) for (name, row), other in pairs}

    def logits(self, given: dict[str, Tensor], silent: bool = False) -> Any:
        """Return those of a full forward, or nothing."""
        found = self.model(**given, image_features=self.features, use_cache=False).logits
        return None if silent else found

    def checks(self) -> Iterator[tuple[str, Callable[[], str | None]]]:
        """Yield what might be wrong, and what returns how far off it is where it is wrong."""
        yield "it reads token ids beside embeddings, and an image has none", self.embeds
        yield "it reads tokens alone, and an image is none", partial(self.logits, self.image, True)
        yield "a later token changes earlier logits", self.causal
        for side, gap in {"right": (0, _PAD), "left": (_PAD, 0)}.items():
            yield f"padding on the {side} changes a row's logits", partial(self.padded, gap)
        cached = "decoding with a cache differs from the full forward"
        yield cached, partial(self.cached, self.image)
        yield f"{cached} where a row is padded", partial(self.cached, self.both((_PAD, 0)))
        yield "generating differs from the full forward", self.generated
        yield "it cannot be trained with labels", self.trained

    def causal(self) -> str | None:
        """Compare logits before another last token."""
        later = {**self.image, "input_ids": self.image["input_ids"].clone()}
        later["input_ids"][:, -1] += 1
        return _off(self.logits(later)[:, :-1], self.logits(self.image)[:, :-1])

    def embeds(self) -> str | None:
        """Compare ids with their embeddings."""
        embeds = self.base.get_input_embeddings()(self.text)
        given = self.base(inputs_embeds=embeds, use_cache=False).logits
        return _off(given, self.base(input_ids=self.text, use_cache=False).logits)

    def padded(self, gap: tuple[int, int]) -> str | None:
        """Compare rows of a batch with each alone."""
        found, whole = self.logits(self.both(gap)), self.logits(self.image)
        text = self.base(input_ids=self.text, use_cache=False).logits
        return _off(found[:1, gap[0] : gap[0] + _LENGTH], whole) or _off(found[1:], text)

    def cached(self, given: dict[str, Tensor]) -> str | None:
        """Compare a first part, a chunk and two single tokens with the full forward."""
        end, found, cache, start = given["input_ids"].shape[1], [], None, 0
        for stop in (end - 10, end - 6, *range(end - 3, end + 1)):
            new = {name: tensor[:, start:stop] for name, tensor in given.items()}
            new["attention_mask"] = given["attention_mask"][:, :stop]
            images = {} if start else {"image_features": self.features}
            out = self.model(**new, **images, past_key_values=cache, use_cache=True)
            cache, start = getattr(out, "past_key_values", None), stop
            if cache is None:
                return "it returns no past_key_values"
            found.append(out.logits)
        real = given["attention_mask"].bool()
        return _off(torch.cat(found, 1)[real], self.logits(given)[real])

    def generated(self) -> str | None:
        """Compare the logits of greedy steps on a padded batch with the full forward's."""
        given = self.both((_PAD, 0))
        made = self.model.generate(
            **given, image_features=self.features, max_new_tokens=3, min_new_tokens=3,
            do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        ends = {
            "input_ids": made.sequences[:, -3:],
            "attention_mask": made.sequences[:, -3:] * 0 + 1,
        }
        ends["mm_token_type_ids"] = ends["attention_mask"] * 0
        full = self.logits({name: torch.cat([given[name], ends[name]], 1) for name in given})
        return _off(torch.stack(made.logits, 1), full[:, -4:-1])

    def trained(self) -> str | None:
        """Compare the loss with that of the logits, and ask for a gradient."""
        self.model.set_trainable(["projector"])
        learned = self.image["mm_token_type_ids"] == 0
        labels = self.image["input_ids"].masked_fill(~learned, -100)
        with torch.enable_grad():
            loss = self.model(**self.image, image_features=self.features, labels=labels).loss
            loss.backward()
        logits = self.logits(self.image)[:, :-1].flatten(0, 1)
        off = _off(loss.detach(), F.cross_entropy(logits, labels[:, 1:].flatten()))
        grads = [parameter.grad for parameter in self.model.workflow().projector.parameters()]
        reached = all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
        return off or (None if reached else "the projector gets no gradient")


def _off(one: Tensor, other: Tensor) -> str | None:
    far, size = (one - other).abs().max().item(), other.abs().max().item()
    return None if far <= _FAR * max(size, 1.0) else f"off by {far:.2g} of {size:.2g}"
