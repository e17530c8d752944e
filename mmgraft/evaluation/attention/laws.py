"""LAWS: how the layers share their attention between the image and the text around it.

Source: Wings, arXiv 2406.03496, section 3. With ``a_ij`` a layer's attention weights, averaged over
heads, and ``S`` the text before the image, the image, or the text after it,

    LAWS_S(l) = sum over queries i, sum over keys j in S, of a^l_ij
    shift     = 1 - pearson(LAWS_before, LAWS_after)            over the layers l

for each sample; the shift is then averaged over samples. The paper ties a larger shift to a larger
loss of text ability.

Attention of one batch by layer and side, with the graft out of the path and in it.

Attention weights are summed over chosen keys, without a map of them. What a query gives to a set of
keys is attention whose values are the set's columns: 1 at a key of the set and 0 elsewhere. So an
attention is called a second time with such columns in place of its values, and what it returns is
summed over the queries. The first call, whose result the base goes on with, is left as it was.

An attention that has no fused kernel (soft-capping, sinks, ``eager``) hands back the weights that
it has computed; those are summed and dropped layer by layer. Attentions outside of transformers'
registry either do the same or call torch's fused kernel, which is met there.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmgraft.anatomy import Anatomy, decoder_layers
from mmgraft.data.chat.processor import Encoded
from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.formats.sources import read_rows
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.answers import refuse_longer
from mmgraft.evaluation.generate.run_features import Features, image_inputs
from mmgraft.evaluation.items.files import file_sha256, sampled
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.metrics.intervals import Measured, paired
from mmgraft.evaluation.origin import described_graft, section_of
from mmgraft.frozen import Frozen
from mmgraft.grafts.base import IMAGE, PADDING, TEXT, Graft
from mmgraft.grafts.registry import get_method
from mmgraft.inference import Answerer
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.rows import kinds_of
from mmgraft.patching import patched_forward
from mmgraft.progress import counted, say
from mmgraft.runs.results import Results, Score, SetResult

IMPLEMENTATION = "mmgraft_sums"
_JOB = "_mmgraft_sums_job"


@dataclass
class AttentionSums:
    """``sum over queries i of mean over heads of sum over keys j in S of a_ij``, for sets ``S``.

    Attributes:
        columns: Which key belongs to which set, ``(b, S, c)`` of 0 and 1.
        queries: Which queries are summed over, ``(b, s)``: those that are no padding.
        sums: What was found, by the attention's name: ``(b, c)`` in fp32.
    """

    columns: Tensor
    queries: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def of(self, attentions: Mapping[str, nn.Module], registry: bool) -> "Iterator[AttentionSums]":
        """Sum every forward of these attentions while the block lasts.

        Args:
            attentions: Attention modules of decoder layers, by the names that ``sums`` gets.
            registry: They call a function of transformers' attention registry; see
                :attr:`mmgraft.anatomy.Anatomy.attention_in_registry`.

        Raises:
            UsageError: An attention whose weights cannot be found out, when it runs.
        """
        with ExitStack() as stack:
            for name, attention in attentions.items():
                plain = cast(Any, attention).config._attn_implementation if registry else None
                watch = partial(self._watch, name, attention, plain)
                stack.enter_context(patched_forward(attention, watch))
            yield self

    def weigh(self, call: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """Return what each query gives to each set, ``(b, s, c)``.

        Args:
            call: The attention as a function of its values; gives ``(b, s, heads, width)``.
            values: The real values ``(b, kv heads, S, width)``: the columns take their place.
        """
        count, width = self.columns.shape[-1], max(values.shape[-1], self.columns.shape[-1])
        columns = F.pad(self.columns.to(values), (0, width - count))  # (b, S, width)
        out = call(columns[:, None].expand(-1, values.shape[1], -1, -1))
        return out[..., :count].float().mean(dim=2)

    def add(self, name: str, given: Tensor) -> None:
        """Sum ``given (b, s, c)`` over the queries."""
        counted = self.queries[:, :, None].to(given.device)
        total = given.float().masked_fill(~counted, 0.0).sum(dim=1)  # (b, c)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def _watch(
        self,
        name: str,
        attention: Any,
        plain: str | None,
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        forward = partial(original, *args, **kwargs)
        if plain not in (None, "eager"):
            job = _Job(self, name, plain, attention.config._attn_implementation)
            out = job.run(attention, forward)
        else:
            with _MeetKernel(self, name):
                out = forward()
        if name not in self.sums:
            weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
            if not isinstance(weights, Tensor) or weights.dim() != 4:
                raise UsageError(
                    f"the attention weights of {type(attention).__name__} cannot be found: it "
                    "calls no kernel that is known and does not hand them back; take a base "
                    "whose attention does, such as Llama or Qwen2"
                )
            mean = weights.mean(dim=1, dtype=torch.float32)
            self.add(name, mean @ self.columns.to(mean))
        return out


@dataclass
class _Job:
    """One call of an attention that goes through transformers' registry."""

    into: AttentionSums
    name: str
    plain: str  # the base's own implementation
    active: str  # the one in place now: the base's own, or a graft's around it

    def run(self, attention: Any, forward: Callable[[], Any]) -> Any:
        config = attention.config
        attention.__dict__[_JOB] = self
        config._attn_implementation_internal = IMPLEMENTATION
        try:
            return forward()
        finally:
            config._attn_implementation_internal = self.active
            del attention.__dict__[_JOB]


def _summing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Call the base's attention function once more, with columns for values."""
    job: _Job = module.__dict__[_JOB]
    config = cast(Any, module).config

    def run(kernel: str, value: Tensor) -> Any:
        config._attn_implementation_internal = kernel  # where flash attention looks for its package
        return ALL_ATTENTION_FUNCTIONS[kernel](module, query, key, value, attention_mask, **kwargs)

    out = run(job.active, value)

    def call(columns: Tensor) -> Tensor:
        return run(job.plain, columns)[0]

    job.into.add(job.name, job.into.weigh(call, value))
    return out


AttentionInterface.register(IMPLEMENTATION, _summing_attention)


class _MeetKernel(TorchFunctionMode):
    """Meets the calls of torch's fused kernel in an attention outside of the registry."""

    def __init__(self, into: AttentionSums, name: str) -> None:
        super().__init__()
        self.into = into
        self.name = name

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self.name not in self.into.sums:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            value, rest = given.pop("value"), args[3:]

            def call(columns: Tensor) -> Tensor:
                query, key = given["query"], given["key"]
                others = {k: v for k, v in given.items() if k not in ("query", "key")}
                return func(query, key, columns, *rest, **others).transpose(1, 2)

            self.into.add(self.name, self.into.weigh(call, value))
        return out


SIDES = ("before", "image", "after")
#: The series in which the workflow runs and its graft does not: the base, fed with images.
PROJECTOR_ONLY = "base_with_projector"

#: After a layer's number: the layer that a graft inserted after it.
INSERTED = "+"
#: Before a layer's number: what a graft attends to beside that layer's attention.
_WATCHED = "beside "


class LayerSums(Frozen):
    """Attention of some samples by layer and side.

    Attributes:
        layers: Names, in the order in which the layers run: "3", and "3+" for one inserted after 3.
        sums: ``(samples, layers, 3)``, the sides as in :data:`SIDES`.
    """

    layers: tuple[str, ...]
    sums: np.ndarray


def side_columns(kinds: Tensor) -> Tensor:
    """Return which position stands where, ``(b, s) -> (b, s, 3)`` of false and true.

    Of a row with several images, text between the first and the last belongs to no side.
    """
    image = kinds == IMAGE
    begun = image.cumsum(dim=1) > 0  # an image here or earlier
    to_come = image.flip(1).cumsum(dim=1).flip(1) > 0
    text = kinds == TEXT
    return torch.stack([text & to_come & ~begun, image, text & begun & ~to_come], dim=-1)


@torch.no_grad()
def layer_sums(
    model: GraftedModel, inputs: Mapping[str, Tensor], workflow: str | None = None
) -> dict[str, LayerSums]:
    """Sum the attention of one batch, with the graft out of the path and in it.

    Args:
        model: In eval mode.
        inputs: Of its forward, rows padded on the right; every row has an image.
        workflow: Of all rows; default: the model's.

    Returns:
        By series. ``base_with_projector`` comes first, and is all for a graft that does nothing in
        the layers. Where layers are inserted, ``base_layers`` (the base's, with the inserted ones
        in the path) and ``all_layers``. Else ``main``, the base's attention with the graft in the
        path, and with attention of the graft beside it (see ``Watch``) ``main_and_learners``: its
        weights times their share are added, so that a query gives up to 2.

    Raises:
        UsageError: An attention whose weights cannot be found out.
    """
    flow = model.workflow(workflow)
    graft, anatomy = flow.graft, model.anatomy
    base = _attentions(decoder_layers(model.base, anatomy), anatomy)
    found = {}
    with _inactive(graft):
        sums = _run(model, inputs, flow.name, base)
    found[PROJECTOR_ONLY] = _gather(sums, base)
    if not graft.active or not any(map(graft.acts_on, range(anatomy.num_layers))):
        return found
    everything, kinds = dict(base), {type(attention) for attention in base.values()}
    for index, module in graft.layer_modules():
        attention = _submodule(module, anatomy.attention_name)
        if attention is not None and type(attention) in kinds:  # not adapters under its name
            everything[f"{index}{INSERTED}"] = attention
    beside: dict[str, Tensor] = {}
    sums = _run(model, inputs, flow.name, everything, graft, beside)
    main = _gather(sums, base)
    if beside:
        both = {n: s + beside[n] if n in beside else s for n, s in sums.items()}
        return {**found, "main": main, "main_and_learners": _gather(both, base)}
    if len(everything) == len(base):
        return {**found, "main": main}
    order = sorted(everything, key=lambda name: (int(name.rstrip(INSERTED)), name))
    return {**found, "base_layers": main, "all_layers": _gather(sums, order)}


def _attentions(layers: nn.ModuleList, anatomy: Anatomy) -> dict[str, nn.Module]:
    """Return attentions by layer; layers of another kind (with a running state) have none."""
    found = {str(i): _submodule(layer, anatomy.attention_name) for i, layer in enumerate(layers)}
    return {name: module for name, module in found.items() if module is not None}


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


@contextmanager
def _inactive(graft: Graft) -> Iterator[None]:
    """Leave the graft out of the path, as ``graft_active: false`` of a stage does."""
    before, graft.active = graft.active, False
    try:
        yield
    finally:
        graft.active = before


def _run(
    model: GraftedModel,
    inputs: Mapping[str, Tensor],
    workflow: str,
    attentions: Mapping[str, nn.Module],
    graft: Graft | None = None,
    beside: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run one forward; return sums by name, and put what the graft watches into ``beside``."""
    ids = inputs["input_ids"]
    image, mask = inputs.get("mm_token_type_ids"), inputs.get("attention_mask")
    kinds = kinds_of((ids.shape[0], ids.shape[1]), image, mask, ids.device)
    sums = AttentionSums(side_columns(kinds), kinds != PADDING)

    def watch(
        index: int, query: Tensor, key: Tensor, mask: Tensor, seen: Tensor, share: Tensor | None
    ) -> None:
        def call(columns: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(query, key, columns, attn_mask=mask)
            return out.transpose(1, 2)

        given = sums.weigh(call, key).masked_fill(~seen, 0.0)  # (b, s, 3)
        sums.add(f"{_WATCHED}{index}", given if share is None else given * share[..., None])

    with ExitStack() as stack:
        stack.enter_context(sums.of(attentions, model.anatomy.attention_in_registry))
        if graft is not None:
            stack.callback(setattr, graft, "watch", graft.watch)
            graft.watch = watch
        model(**inputs, workflow=workflow, use_cache=False, logits_to_keep=1)
    for name in [name for name in sums.sums if name.startswith(_WATCHED)]:
        assert beside is not None
        beside[name.removeprefix(_WATCHED)] = sums.sums.pop(name)
    return sums.sums


def _gather(sums: Mapping[str, Tensor], names: Sequence[str] | Mapping[str, Any]) -> LayerSums:
    chosen = tuple(names)
    stacked = torch.stack([sums[name].cpu() for name in chosen], dim=1)
    return LayerSums(chosen, stacked.double().numpy())


#: Why a sample has no attention shift.
LEFT_OUT = ("no_image", "no_text_before", "no_text_after", "no_variance")

Sample = Row | Item
_CONSTANT = 1e-6  # a curve that varies by less, of its largest value, is rounding


# -- shifts -------------------------------------------------------------------------------------


def attention_shift(sums: np.ndarray) -> np.ndarray:
    """Compute ``1 - pearson(before, after)`` over layers, ``(samples, layers, 3) -> (samples,)``.

    Not a number where the before or the after side does not vary over the layers.
    """
    before, after = sums[..., 0], sums[..., 2]
    varies = _varies(before) & _varies(after)
    before = before - before.mean(axis=-1, keepdims=True)
    after = after - after.mean(axis=-1, keepdims=True)
    below = np.sqrt((before**2).sum(axis=-1) * (after**2).sum(axis=-1))
    above = (before * after).sum(axis=-1)
    shift = 1 - np.divide(above, below, out=np.zeros_like(above), where=varies)
    return np.where(varies, shift, np.nan)


def _varies(curve: np.ndarray) -> np.ndarray:
    return np.ptp(curve, axis=-1) > _CONSTANT * np.abs(curve).max(axis=-1)


# -- many samples -------------------------------------------------------------------------------


def read_samples(
    path: str | Path, images: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> Sequence[Row]:
    """Read rows of a file, or a sample of them by a seed, in the file's order.

    Raises:
        UsageError: See :func:`mmgraft.data.formats.sources.read_rows`.
    """
    return sampled(read_rows(path, images), limit, seed)


def evaluate_laws(
    answerer: Answerer,
    samples: Sequence[Sample],
    run: Path,
    *,
    file: Path | None = None,
    name: str = "laws",
    workflow: str | None = None,
    batch_size: int = 8,
    features: Features | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Results:
    """Measure attention by layer (in ``details``), and its shift, of images between text.

    Args:
        answerer: The grafted model and its processor.
        samples: Rows or items; those without an image between text are left out and counted.
        run: Its folder.
        file: Where the samples were read; by default as the first one says.
        name: Of the set.
        workflow: Default: the graft's.
        batch_size: Samples a batch, of like length.
        features: The tower's features of image files.
        settings: Noted in the result.

    Raises:
        UsageError: No sample is left, an unreadable image, or an attention without weights.
    """
    began, file = time.monotonic(), _file(samples, file)
    workflow = refuse_memory(answerer.model.workflow(workflow).record)
    batches = _Batches(answerer, samples, workflow, features)
    say(f"attention of {len(batches.order)} of {len(samples)} samples by layer")
    measured = _Shifts(batches, batches.sums(batch_size))
    measured.refuse_empty(file)
    result = SetResult(
        name=name,
        metric="attention_shift",
        file=file.name,
        sha256=file_sha256(file),
        items=len(measured.used),
        settings={"batch_size": batch_size, "workflow": workflow, **(settings or {})},
        seconds=time.monotonic() - began,
        **measured.scores(),
    )
    graft = described_graft(answerer.model, run, workflow)
    return section_of("laws", graft, [result], details={name: measured.details()})


def refuse_memory(record: GraftFile) -> str:
    """Refuse a method whose images the attention of the base does not reach.

    Returns:
        The name of the graft's workflow.

    Raises:
        UsageError: It keeps images beside the sequence.
    """
    if get_method(record.method).memory:
        raise UsageError(
            f"laws sums what the base's attention gives to an image and to the text around it, and "
            f"method {record.method} keeps an image's vectors beside the sequence, where that "
            "attention does not reach: there is nothing to sum"
        )
    return record.workflow


def _file(samples: Sequence[Sample], file: Path | None) -> Path:
    if not samples:
        raise UsageError("no samples to measure; give rows with an image between text")
    file = file or Path(samples[0].file)
    if not file.is_file():
        raise UsageError(f"no file {str(file)!r} that the samples come from; say where they do")
    return file


class _Batches:
    """The samples as rows, those that can be measured in order of length."""

    def __init__(
        self,
        answerer: Answerer,
        samples: Sequence[Sample],
        workflow: str,
        features: Features | None,
    ) -> None:
        self.model, self.processor = answerer.model, answerer.processor
        self.samples, self.workflow, self.features = samples, workflow, features
        self.encoded = [_encode(answerer, sample) for sample in samples]
        names = [sample.where for sample in samples]
        refuse_longer(self.encoded, names, self.model.anatomy.position_table)
        reasons = [_lacks(row) for row in self.encoded]
        self.left_out = Counter(reason for reason in reasons if reason is not None)
        kept = [at for at, reason in enumerate(reasons) if reason is None]
        self.order = sorted(kept, key=lambda at: len(self.encoded[at]))

    def sums(self, batch_size: int) -> dict[str, LayerSums]:
        """Return every series of the samples, in order of length."""
        found: dict[str, list[LayerSums]] = {}
        starts = range(0, len(self.order), batch_size)
        for start in counted("measuring attention, batches", starts):
            chosen = self.order[start : start + batch_size]
            for series, sums in layer_sums(self.model, self._inputs(chosen), self.workflow).items():
                found.setdefault(series, []).append(sums)
        return {
            series: LayerSums(parts[0].layers, np.concatenate([part.sums for part in parts]))
            for series, parts in found.items()
        }

    def _inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.encoded[at] for at in chosen]
        inputs = self.processor.collate(rows, "right")
        if inputs["attention_mask"].all():
            del inputs["attention_mask"]  # no padding: the base then needs no mask of s x s
        device, names = self.model.device, [self.samples[at].where for at in chosen]
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        return inputs | image_inputs(device, self.processor, rows, self.features, names)


class _Shifts:
    """The attention shifts of every series, of samples whose curves vary."""

    def __init__(self, batches: _Batches, found: Mapping[str, LayerSums]) -> None:
        self.batches, self.found = batches, found
        shifts = {f"shift_{series}": attention_shift(one.sums) for series, one in found.items()}
        self.whole = ~np.isnan(sum(shifts.values(), np.zeros(len(batches.order))))
        if not self.whole.all():
            batches.left_out["no_variance"] = int((~self.whole).sum())
        self.used = [at for at, keep in zip(batches.order, self.whole, strict=True) if keep]
        self.groups = [_group(batches.samples[at]) for at in self.used]
        self.shares = {
            series: Measured.means(**{series: shift[self.whole]})
            for series, shift in shifts.items()
        }

    def refuse_empty(self, file: Path) -> None:
        """Refuse samples of which none is left."""
        if self.used:
            return
        counts = self.batches.left_out.items()
        why = ", ".join(f"{count} {reason}" for reason, count in counts if count)
        raise UsageError(
            f"{file} leaves no sample to measure ({why}): give rows with an image between text; a "
            "system prompt counts as text before it, the question as text after it"
        )

    def scores(self) -> dict[str, Any]:
        """Return the mean shifts, and their changes to the base with the projector."""
        alone = f"shift_{PROJECTOR_ONLY}"
        scores = {series: one.scores(self.groups)[series] for series, one in self.shares.items()}
        change = {one: self._change(one, alone) for one in self.shares if one != alone}
        return {"main": list(scores)[-1], "scores": scores, "change": change}

    def details(self) -> dict[str, Any]:
        """Return the curves, and how many samples were left out and why."""
        encoded, left_out = self.batches.encoded, self.batches.left_out
        lengths = np.array([len(encoded[at]) for at in self.used], dtype=np.float64)
        curves = {
            series: _curves(one, one.sums[self.whole] / lengths[:, None, None])
            for series, one in self.found.items()
        }
        details = {
            "samples": len(encoded),
            "used": len(self.used),
            "left_out": {reason: left_out[reason] for reason in LEFT_OUT},
            "series": curves,
        }
        if "shift_main_and_learners" in self.shares:
            added = self._change("shift_main_and_learners", "shift_main")
            details["learners_change"] = added.model_dump()
        return details

    def _change(self, series: str, before: str) -> Score:
        one, other = self.shares[series], self.shares[before]
        return paired(one.columns, other.columns, groups=self.groups)


def _encode(answerer: Answerer, sample: Sample) -> Encoded:
    """Encode a row whole, with its answer; an item up to where the answer begins."""
    ends_with_question = bool(sample.messages) and sample.messages[-1].get("role") == "user"
    return answerer.processor.encode(
        sample.messages, ends_with_question, sample.tools, sample.where
    )


def _lacks(row: Encoded) -> str | None:
    """Return why a sample has no curves, or None."""
    if 1 not in row.kinds:
        return "no_image"
    if row.kinds[0] == 1:
        return "no_text_before"
    return "no_text_after" if row.kinds[-1] == 1 else None


def _group(sample: Sample) -> Any:
    group = sample.group if isinstance(sample, Item) else None
    return group or tuple(map(str, images_of_all(sample.messages)))


def _curves(found: LayerSums, shares: np.ndarray) -> dict[str, list[Any]]:
    """Return the layers, and a list over layers for each side, of ``(samples, layers, 3)``."""
    average = shares.mean(axis=0)
    sides = {side: [float(x) for x in average[:, at]] for at, side in enumerate(SIDES)}
    return {"layers": list(found.layers), **sides}
