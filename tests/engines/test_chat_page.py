"""The chat page in headless Chromium, against a running server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import Page, chromium
from taught import BOX
from vllm_engine import Graft, image
from vllm_server import Server, running

PAGE = (Path(__file__).resolve().parent.parent.parent / "examples/serve/chat.html").as_uri()
LAST_TURN = "[...document.querySelectorAll('.turn')].at(-1)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module", params=["vLLM", "this process"])
def asked(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The same grafts, served in both ways."""
    if request.param == "vLLM":
        yield server
    else:
        folder = tmp_path_factory.mktemp("here")
        with running(server.runs, folder, "", "--cors", "--no-vllm", "--dtype", "float32") as made:
            yield made


@pytest.fixture
def page(browser: Page, asked: Server) -> Page:
    """Connected to the server, with its key."""
    browser.open(f"{PAGE}#server={asked.address}/v1")
    browser.wait("document.querySelector('.error')")  # it has no key yet
    browser.value("at('turns').replaceChildren()")
    browser.value("at('key').value = 'open'")
    browser.value("at('connect').click()")
    browser.wait("at('model').length")
    browser.value("at('tokens').value = 60")
    return browser


def answered(page: Page, question: str) -> str:
    """Ask, and return the answer once all of it is there."""
    before = page.value("messages.length")
    page.type("#question", question)
    page.wait(f"messages.length == {before + 2} || document.querySelector('.error')")
    assert page.value("document.querySelector('.error') === null"), told(page)
    return page.value("messages.at(-1).content")


def told(page: Page) -> str:
    """The last thing that is on the page."""
    return page.value(f"{LAST_TURN}.innerText")


def red(page: Page, x: float, y: float) -> bool:
    """Tell whether the last canvas is red there, as a box is; shares of the image."""
    pixel = page.value(
        "(() => { const one = [...document.querySelectorAll('canvas')].at(-1); return [...one."
        f"getContext('2d').getImageData({x} * one.width, {y} * one.height, 1, 1).data]; }})()"
    )
    return pixel[:3] == [238, 51, 51]


def test_it_lists_the_models(page: Page, asked: Server) -> None:
    listed = page.value("[...at('model').options].map(one => one.value)")
    assert listed == ["qwen2", *asked.runs]


def test_a_key_that_is_wrong_is_told(page: Page) -> None:
    page.value("at('key').value = 'shut'")
    page.value("at('connect').click()")
    page.wait("document.querySelector('.error')")
    assert "key" in told(page)
    page.value("at('key').value = 'open'")
    page.value("at('connect').click()")
    page.wait("at('model').length")


@pytest.mark.parametrize("how", ["dropped", "chosen"])
def test_a_box_is_drawn_on_the_image(page: Page, tmp_path: Path, how: str) -> None:
    image(16, 7).save(tmp_path / "a.png")
    page.value("at('model').value = 'finds'")
    if how == "dropped":
        page.drop_file("#drop", tmp_path / "a.png")
    else:
        page.choose_file("#file", tmp_path / "a.png")
    page.wait("waiting")
    assert "a.png goes with the next question" in page.value("at('drop').innerText")
    assert answered(page, "Where is it?") == BOX
    page.wait("document.querySelectorAll('canvas').length == 2")
    assert page.value("[...document.querySelectorAll('canvas')].map(one => one.dataset.boxes)") == [
        "0",
        "1",
    ]
    for x, y in ((0.25, 0.75), (0.5, 0.5), (0.74, 0.6), (0.6, 0.99)):
        assert red(page, x, y), "BOX goes through it"
    for x, y in ((0.5, 0.75), (0.1, 0.1), (0.9, 0.9)):
        assert not red(page, x, y)


def test_the_answer_grows_as_it_comes(page: Page, tmp_path: Path) -> None:
    image(16, 7).save(tmp_path / "a.png")
    page.value("at('model').value = 'finds'")
    page.choose_file("#file", tmp_path / "a.png")
    page.wait("waiting")
    page.value("window.seen = []")
    page.value(
        f"new MutationObserver(() => seen.push({LAST_TURN}.lastElementChild.textContent))"
        ".observe(at('turns'), {childList: true, subtree: true, characterData: true})"
    )
    assert answered(page, "Where is it?") == BOX
    grown = [one for one in page.value("seen") if one and BOX.startswith(one)]
    assert len(set(grown)) > 2, "all of it came at once"
    assert grown == sorted(grown, key=len)


def test_text_is_the_bases_under_every_name(page: Page, asked: Server) -> None:
    graft = Graft(asked.runs["words"])
    ids, _ = graft.answer([{"role": "user", "content": "One, two?"}], 60)
    wanted = graft.processor.answer(ids)
    for name in ("words", "boxes", "qwen2"):
        page.value(f"at('model').value = {name!r}")
        page.value("at('clear').click()")
        assert answered(page, "One, two?").strip() == wanted


def test_what_the_server_refuses_is_shown_and_the_image_is_kept(page: Page, tmp_path: Path) -> None:
    image(16, 7).save(tmp_path / "a.png")
    page.value("at('model').value = 'qwen2'")
    page.choose_file("#file", tmp_path / "a.png")
    page.wait("waiting")
    page.type("#question", "Where is it?")
    page.wait("document.querySelector('.error')")
    assert "sees no images" in told(page)
    page.value("document.querySelector('.error').remove()")
    page.value("at('model').value = 'finds'")
    assert answered(page, "Where is it?") == BOX, "the image goes with the next question"


def test_a_server_that_is_gone_is_told(page: Page) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    page.value(f"at('address').value = 'http://127.0.0.1:{port}/v1'")
    page.type("#question", "One, two?")
    page.wait("document.querySelector('.error')")
    assert f"no answer from http://127.0.0.1:{port}/v1" in told(page)
    assert page.value("messages.length") == 0
    page.value("at('connect').click()")
    page.wait("document.querySelectorAll('.error').length == 2")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[0.25,0.5,0.75,1.0]", [[0.25, 0.5, 0.75, 1.0]]),
        ("a dog [[100,200,300,999]] there", [[100 / 999, 200 / 999, 300 / 999, 1]]),
        (
            "[[1,2,3,4;5,6,7,8]]",
            [[one / 999 for one in row] for row in ((1, 2, 3, 4), (5, 6, 7, 8))],
        ),
        ("<box>(0,1),(2,999)</box>", [[0, 1 / 999, 2 / 999, 1]]),
        ("[1,2,3] and [0.5]", []),
    ],
)
def test_boxes_of_every_kind_are_found(browser: Page, text: str, wanted: Any) -> None:
    browser.open(PAGE)
    found = browser.value(f"boxesIn({text!r}, {{naturalWidth: 9, naturalHeight: 9}})")
    assert found == [pytest.approx(row) for row in wanted]
