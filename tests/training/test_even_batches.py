"""An epoch as long on every rank, whose fillers teach nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mmgraft.data.batches.collate import Pack
from mmgraft.data.batches.dataset import Example
from mmgraft.data.batches.sampler import EpochSampler, EvenDataset, EvenSampler, Filler
from mmgraft.data.chat.processor import Encoded

SEEN = Example(Encoded([5, 6, 7], [0, 1, 0], ["a.png"], ((2, 3),)), ["a.png"], "1", "row 1")


class Rows:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@given(rows=st.integers(1, 40), together=st.integers(1, 12), epoch=st.integers(0, 3))
def test_every_row_once_then_fillers_up_to_a_whole_step(rows: int, together: int, epoch: int):
    order = EpochSampler(rows, seed=1)
    sampler = EvenSampler(order, together)
    sampler.set_epoch(epoch)
    assert order.epoch == epoch
    found = list(sampler)
    assert len(found) == len(sampler)
    assert len(found) % together == 0
    assert len(found) < rows + together
    assert found[:rows] == list(order)
    assert found[rows:] == [Filler(found[0])] * (len(found) - rows)


def test_a_filler_is_shown_and_not_learned():
    dataset = EvenDataset(Rows([SEEN]))
    assert dataset[0] is SEEN
    filler = dataset[Filler(0)]
    assert filler.encoded.labels == [-100] * 3
    assert (filler.encoded.input_ids, filler.images) == (SEEN.encoded.input_ids, SEEN.images)
    assert SEEN.encoded.labels == [-100, -100, 7]  # the row itself is learned as ever


def test_rows_in_order_are_filled_up_too():
    dataset = EvenDataset(Rows([SEEN] * 5), together=4)
    assert len(dataset) == 8
    assert [dataset[at] is SEEN for at in range(8)] == [True] * 5 + [False] * 3
    assert dataset[7].encoded.labels == [-100] * 3
    assert len(EvenDataset(Rows([SEEN] * 8), together=4)) == 8


def test_all_rows_of_a_filling_pack_are_not_learned():
    filler = EvenDataset(Rows([Pack([SEEN, SEEN])]))[Filler(0)]
    assert [example.encoded.labels for example in filler.examples] == [[-100] * 3] * 2
