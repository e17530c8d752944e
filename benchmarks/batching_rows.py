"""Measure the switches of a batch: packing, group_by, attention, compile.

    python benchmarks/batching_rows.py [--case packing] [--rows 48] [--layers 2] [--pairs 3]

Rows are drawn as in an instruction mixture: seven of ten are an image of 576 positions with a
question and an answer, the others are text; lengths are log-normal (a median of 120 positions of
text beside an image, of 300 without one) and end at `--max-length`. The base has SmolLM2's shape,
cut to `--layers`, with one inserted layer (IAA); image features are given, fp32. Timed is one pass,
forward and backward, over the same rows in the order and the batches that the trainer would take,
against the same rows in batches of `--batch` drawn at random. A packed batch has as many sequences
as hold about the positions of a batch of rows. Memory is the peak of the widest batch above the
model. Filling is counted over 20,000 rows. `--part 4 --vocab 4096 --layers 1` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import models
import torch
from pairs import Peak, Ratio, Row, alternate, clock, in_child, options, show
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmgraft import IAAConfig
from mmgraft.data.batches.sequences import learned_within
from mmgraft.model.kernels.compiling import compiled_layers
from mmgraft.model.modeling import GraftedModel
from mmgraft.training.row_order import GroupSampler, PackSampler

CASES = ("packing", "length", "modality", "attention", "compile")
COUNTED = 20_000
TEXT_SHARE = 0.3
TEXT_BESIDE, TEXT_ALONE, SPREAD = 120.0, 300.0, 0.7
WHOLE_IMAGE = models.IMAGE_TOKENS
ANSWER = 0.6  # of a row's text
Batch = list[tuple[int, ...]]  # sequences, each of one row or, packed, of several


@dataclass(frozen=True)
class Lengths:
    """Rows by their lengths: ``text (n,)`` positions beside the image, and which have one."""

    text: Tensor
    image: Tensor

    @property
    def whole(self) -> Tensor:
        """All positions of each row."""
        return self.text + models.IMAGE_TOKENS * self.image


def main() -> int:
    """Measure every case and print."""
    parser = options(__doc__, pairs=3)
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2, help="of the base")
    parser.add_argument("--vocab", type=int, default=models.VOCAB)
    parser.add_argument("--part", type=int, default=1, help="all lengths so many times shorter")
    parser.add_argument("--no-memory", action="store_true")
    chosen = parser.parse_args()
    models.IMAGE_TOKENS //= chosen.part
    chosen.max_length //= chosen.part
    torch.set_num_threads(chosen.threads)
    rows = [_measure(case, chosen) for case in chosen.case or CASES]
    return show(chosen, rows)


def drawn(count: int, longest: int, seed: int = 0) -> Lengths:
    """Rows as the module says."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.rand(count, generator=draw) >= TEXT_SHARE
    median = torch.where(image, TEXT_BESIDE, TEXT_ALONE)
    median = median * models.IMAGE_TOKENS / WHOLE_IMAGE
    text = median * (SPREAD * torch.randn(count, generator=draw)).exp()
    room = longest - models.IMAGE_TOKENS * image
    return Lengths(text.long().clamp(min=8).minimum(room), image)


# -- orders ---------------------------------------------------------------------------------------


def batches(case: str, lengths: Lengths, chosen: argparse.Namespace) -> list[Batch]:
    """The batches of an epoch under a switch; those of `rows` are drawn at random."""
    size, count = chosen.batch, len(lengths.text)
    if case == "packing":
        packs = list(PackSampler(lengths.whole, chosen.max_length))
        size = max(1, round(size * float(lengths.whole.float().mean()) / chosen.max_length))
        return [packs[at : at + size] for at in range(0, len(packs), size)]
    if case == "length":
        order = list(GroupSampler(lengths.whole, size))
    elif case == "modality":
        order = list(GroupSampler(lengths.image.long(), size, sort=False))
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    single = [(at,) for at in order]
    return [single[at : at + size] for at in range(0, count, size)]


def filled(made: Sequence[Batch], lengths: Lengths) -> float:
    """Return the share of computed positions that are a row's."""
    whole = lengths.whole.tolist()
    computed = sum(
        len(batch) * max(sum(whole[at] for at in sequence) for sequence in batch) for batch in made
    )
    return sum(whole) / computed


# -- computing ------------------------------------------------------------------------------------


def inputs(model: GraftedModel, batch: Batch, lengths: Lengths) -> dict[str, Any]:
    """Return the collator's batch of rows of these lengths."""
    draw = torch.Generator().manual_seed(batch[0][0])
    columns: dict[str, list[Tensor]] = {"ids": [], "kinds": [], "labels": [], "segments": []}
    images, token = 0, models.image_token(model)
    for sequence in batch:
        parts: dict[str, list[Tensor]] = {name: [] for name in columns}
        for number, at in enumerate(sequence, start=1):
            shown = models.IMAGE_TOKENS * int(lengths.image[at])
            length = shown + int(lengths.text[at])
            kinds = (torch.arange(length) < shown).long()
            ids = torch.randint(3, min(20_000, token), (length,), generator=draw)
            ids[:shown] = token
            labels = ids.clone()
            labels[: length - int(ANSWER * int(lengths.text[at]))] = -100
            images += bool(shown)
            for name, tensor in zip(
                columns, (ids, kinds, labels, torch.full((length,), number)), strict=True
            ):
                parts[name].append(tensor)
        for name, tensors in parts.items():
            columns[name].append(torch.cat(tensors))
    segments = pad_sequence(columns["segments"], batch_first=True)
    labels = pad_sequence(columns["labels"], batch_first=True, padding_value=-100)
    made = {
        "input_ids": pad_sequence(columns["ids"], batch_first=True),
        "attention_mask": (segments > 0).long(),
        "mm_token_type_ids": pad_sequence(columns["kinds"], batch_first=True),
        "labels": learned_within(labels, segments),
        "workflow": "mm",
    }
    if any(len(sequence) > 1 for sequence in batch):
        made["segments"] = segments
    if images:
        width = model.base.config.hidden_size
        made["image_features"] = torch.randn(images, models.IMAGE_TOKENS, width, generator=draw)
    return made


def trained(chosen: argparse.Namespace, attention: str = "sdpa") -> GraftedModel:
    """The model, opened for a second stage of IAA."""
    base = models.base(chosen.vocab, num_hidden_layers=chosen.layers, attn_implementation=attention)
    config = IAAConfig(layers=models.places(1, chosen.layers), embedding=False, head=False)
    model = models.grafted(base, config)
    model.set_trainable(["projector", "graft"])
    model.train()
    return model


def passing(model: GraftedModel, made: Sequence[Batch], lengths: Lengths) -> Callable[[], None]:
    """One pass over all batches, forward and backward."""
    ready = [inputs(model, batch, lengths) for batch in made]

    def work() -> None:
        for one in ready:
            model(**one).loss.backward()
        model.zero_grad()

    return work


def _measure(case: str, chosen: argparse.Namespace) -> Row:
    lengths = drawn(chosen.rows, chosen.max_length)
    plain, own = batches("rows", lengths, chosen), batches(case, lengths, chosen)
    model = trained(chosen)
    theirs = passing(model, plain, lengths)
    ours, against = passing(model, own, lengths), f"batches of {chosen.batch} rows at random"
    if case == "attention":
        ours, against = theirs, "attention: eager"
        theirs = passing(trained(chosen, "eager"), plain, lengths)
    if case == "compile":
        ours, against = _compiled(model, theirs), "the same without compile"
    pairs = alternate(ours, theirs, pairs=chosen.pairs, clock=clock(chosen))
    values: dict[str, Any] = {"seconds": pairs.seconds, "time": pairs.ratio.median}
    said = [f"time {_percent(pairs.ratio)}"]
    if not chosen.no_memory and case != "compile":
        peaks = [_peak(chosen, case, lengths), _peak(chosen, "rows", lengths)]
        if case == "attention":
            peaks = [peaks[1], _peak(chosen, "rows", lengths, "eager")]
        values["peaks"] = peaks
        said.append(f"peak {peaks[0] / peaks[1]:.2f}x ({peaks[0] / 1e9:.2f} GB)")
    if case not in ("attention", "compile"):
        many = drawn(COUNTED, chosen.max_length)
        shares = [filled(batches(one, many, chosen), many) for one in (case, "rows")]
        values["filled"] = shares
        said.append(f"{shares[0]:.1%} of positions are a row's, {shares[1]:.1%} without")
    name = {"packing": "packing: true", "attention": "attention: sdpa", "compile": "compile: true"}
    what = f"`{name.get(case, f'group_by: {case}')}`, a pass over {chosen.rows} rows"
    return Row(what, against, "; ".join(said), "reported", None, values)


def _compiled(model: GraftedModel, work: Callable[[], None]) -> Callable[[], None]:
    graft = model.workflow().graft

    def compiled() -> None:
        with compiled_layers(model.base, model.anatomy, [graft]):
            work()

    return compiled


def _percent(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _peak(chosen: argparse.Namespace, case: str, lengths: Lengths, attention: str = "sdpa") -> int:
    """Bytes that the widest batch takes above the model, in a process of its own."""
    made = batches(case, lengths, chosen)
    whole = lengths.whole.tolist()
    widest = max(
        made,
        key=lambda batch: len(batch) * max(sum(whole[at] for at in one) for one in batch),
    )

    def work() -> dict[str, Any]:
        model = trained(chosen, attention)
        one = inputs(model, widest, lengths)
        passing(model, [[(0,)]], drawn(1, chosen.max_length))()  # gradients are there
        with Peak() as peak:
            model(**one).loss.backward()
        return {"peak": peak.bytes}

    answer = in_child(work)
    if "error" in answer:
        raise SystemExit(f"{case}: {answer['error']}")
    return int(answer["peak"])


if __name__ == "__main__":
    sys.exit(main())
