from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmgraft.errors import UsageError
from stamps import Stamp, cut_out, phrase_of, read_stamps, split_by_phrase
from tiny_stamps import make_stamps, save_stamp


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stamps(tmp_path_factory.mktemp("stamps"))


@pytest.mark.parametrize(
    ("caption", "phrase"),
    [
        ("A red apple.", "the red apple"),
        ("An “Adelaide” Rosella.", "the Adelaide Rosella"),
        ("Some cherries.", "the cherries"),
        ("The full moon.", "the full moon"),
        ("A happy lion!", "the happy lion"),
        ("A spider playing soccer in spring.", None),
        ("Eat your broccoli!", None),
        ("Two wild boars.", None),
        ("Antarctica.", None),
        ("A 50-cent coin.", None),
        ("A house (old).", None),
        ("A", None),
    ],
)
def test_a_phrase_is_a_short_plain_noun_phrase(caption: str, phrase: str | None) -> None:
    assert phrase_of(caption) == phrase


def test_captions_are_the_first_line_and_stamps_in_order_of_names(source: Path) -> None:
    stamps = read_stamps(source)
    names = [stamp.name for stamp in stamps]
    assert names == sorted(names)
    by_name = {stamp.name: stamp for stamp in stamps}
    assert by_name["animals/birds/red_hat"].caption == "A red hat."
    assert by_name["animals/birds/red_hat"].category == "animals"
    assert "town/sign_mirror" not in by_name, "it has no caption of its own"
    assert "town/drawn" not in by_name, "it has no picture that can be read"
    assert len(stamps) == 30 + 4


def test_a_first_line_that_is_a_translation_is_no_caption(tmp_path: Path) -> None:
    save_stamp(tmp_path / "a.png", "de.utf8=Ein Hut.", (20, 20), "red")
    save_stamp(tmp_path / "b.png", "A hat.", (20, 20), "red")
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "c.txt").write_text("")
    assert [stamp.name for stamp in read_stamps(tmp_path)] == ["b"]


def test_a_cut_out_touches_all_four_edges(source: Path) -> None:
    picture = cut_out(Stamp("x", source / "food/green_cup.png", "A green cup."), longest=200)
    assert picture is not None
    assert (picture.mode, picture.size) == ("RGBA", (40, 30))
    small = cut_out(Stamp("x", source / "food/green_cup.png", "A green cup."), longest=20)
    assert small is not None
    assert max(small.size) <= 20
    solid = small.getchannel("A").point([255 * (alpha >= 32) for alpha in range(256)])
    assert solid.getbbox() == (0, 0, *small.size)


def test_a_picture_without_a_clear_pixel_is_not_cut_out(source: Path) -> None:
    assert cut_out(Stamp("x", source / "town/wall.png", "A wall."), 100) is None


def test_a_picture_with_nothing_in_it_is_not_cut_out(tmp_path: Path) -> None:
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert cut_out(Stamp("clear", tmp_path / "clear.png", "A ghost."), 100) is None


def test_no_phrase_is_in_both_parts_of_a_split(source: Path) -> None:
    stamps = [stamp for stamp in read_stamps(source) if stamp.phrase]
    twice = [*stamps, Stamp("again", stamps[0].path, stamps[0].caption.upper())]
    for seed in range(20):
        train, test = split_by_phrase(twice, 0.25, seed)
        assert len(train) + len(test) == len(twice)
        phrases = [{str(stamp.phrase).lower() for stamp in part} for part in (train, test)]
        assert not phrases[0] & phrases[1]
        assert len(phrases[1]) == round(0.25 * len(phrases[0] | phrases[1]))
    assert split_by_phrase(stamps, 0.25, 1) == split_by_phrase(stamps, 0.25, 1)
    assert split_by_phrase(stamps, 0.25, 1) != split_by_phrase(stamps, 0.25, 2)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="apt-get install tuxpaint-stamps-default"):
        read_stamps(tmp_path / "nowhere")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"broken\.png cannot be read"):
        cut_out(Stamp("broken", tmp_path / "broken.png", "A broken thing."), 100)
