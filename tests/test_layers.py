from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgraft.errors import UsageError
from mmgraft.layers import check_layers, parse_layers

SIZES = st.integers(1, 200)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,7", [3, 7]),
        ("7, 3", [3, 7]),
        ("2-6", [2, 3, 4, 5, 6]),
        ("0-11:5", [0, 5, 10]),
        ("1-11:5", [1, 6, 11]),
        ("every:4", [3, 7, 11]),
        ("every:5", [4, 9]),
        ("last:2", [10, 11]),
        ("spread:3", [2, 6, 10]),
        ("spread:5", [1, 3, 6, 8, 10]),
        ("spread:24", list(range(11))),
        ("all", list(range(12))),
        ("ALL", list(range(12))),
        ("0,5-6,last:1", [0, 5, 6, 11]),
        ([7, 3], [3, 7]),
        ((0,), [0]),
    ],
)
def test_every_form(text: str | list[int], expected: list[int]) -> None:
    assert parse_layers(text, 12) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12", "layer 12 does not exist: the base has 12 layers, counted 0 to 11"),
        ("5-12", "layer 12 does not exist"),
        ([12], "layer 12 does not exist"),
        ("3,3", "layer 3 is named twice"),
        ("3,2-4", "layer 3 is named twice"),
        ("11,last:1", "layer 11 is named twice"),
        ([4, 4], "layer 4 is named twice"),
        ("", "no layers are named"),
        ([], "no layers are named"),
        ("3,", "'' is in no known form"),
        ("-1", "'-1' is in no known form"),
        ([-1], "-1 is not a layer"),
        ([True], "True is not a layer"),
        (["3"], "'3' is not a layer"),
        ("6-2", "the smaller layer comes first"),
        ("0-6:0", "the step is at least 1"),
        ("every:0", "between 1 and the base's 12 layers"),
        ("last:13", "between 1 and the base's 12 layers"),
        ("spread:0", "between 1 and the base's 12 layers"),
        ("two", "'two' is in no known form"),
        ("1.5", "'1.5' is in no known form"),
        ("0-99999999999", "larger than any model"),
        ("３", "is in no known form"),  # a full-width digit is a digit to str.isdigit
    ],
)
def test_wrong_layers_are_refused_in_words(text: str | list[int], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers(text, 12)
    assert said in str(caught.value)


def test_a_base_without_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="0 layers"):
        parse_layers("all", 0)


@given(size=SIZES, data=st.data())
def test_a_list_written_as_text_is_the_same_list(size: int, data: st.DataObject) -> None:
    layers = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    text = ",".join(map(str, layers))
    assert parse_layers(text, size) == parse_layers(list(layers), size) == sorted(layers)
    check_layers(text)


@given(size=SIZES, data=st.data())
def test_a_range_is_python_range_with_both_ends(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, size - 1))
    step = data.draw(st.integers(1, size))
    assert parse_layers(f"{first}-{last}:{step}", size) == list(range(first, last + 1, step))


@given(size=SIZES, data=st.data())
def test_every_and_last_count_from_the_top(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    every = parse_layers(f"every:{count}", size)
    assert len(every) == size // count
    assert all((layer + 1) % count == 0 for layer in every)
    assert parse_layers(f"last:{count}", size) == list(range(size))[-count:]


@given(text=st.text(alphabet="0123456789-:, everylastx", max_size=12), size=SIZES)
def test_any_text_gives_valid_layers_or_a_usage_error(text: str, size: int) -> None:
    try:
        layers = parse_layers(text, size)
    except UsageError:
        return
    assert layers == sorted(set(layers))
    assert all(0 <= layer < size for layer in layers)
    check_layers(text)  # what a base accepts, a config must have accepted


def test_check_layers_needs_no_base_but_finds_what_it_can() -> None:
    check_layers("every:4,99")
    for wrong in ("3,3", "x", ""):
        with pytest.raises(UsageError):
            check_layers(wrong)
