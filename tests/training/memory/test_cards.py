from __future__ import annotations

import pytest

from mmgraft.training.memory.shortage import cards, reserve, smallest


def test_the_sizes_are_the_common_ones():
    assert [card.gb for card in cards()] == [8, 11, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192]


def test_a_gigabyte_and_a_twentieth_stay_free():
    by_size = {card.gb: card.usable for card in cards()}
    assert by_size[24] == pytest.approx(21.8e9)  # 24 - 1.2 - 1
    assert reserve() == "1 GB and 5% of a card"


def test_the_smallest_card_that_is_enough():
    assert [smallest(int(n * 1e9)).gb for n in (0.1, 6.6, 6.61, 21.8, 21.9)] == [8, 8, 11, 24, 32]
    assert smallest(int(500e9)) is None
