"""A dialogue gives what a fresh run of all its turns gives, whatever its cache holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmgraft.errors import UsageError
from mmgraft.inference import Answerer, Dialogue, prompt_of
from tiny import save_base, tiny_clip_dir
from tiny_runs import make_run
from tiny_towers import picture

SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answering")
    save_base(folder / "base", "llama", max_position_embeddings=512)
    tiny_clip_dir(folder / "tower")
    picture(which=0).save(folder / "a.png")
    picture(which=1).save(folder / "b.png")
    return folder


RUNS = {
    "iaa": {"layers": [1, 3]},
    "wings": {"rank": 4},
    "lora": {"rank": 4, "gate": "token"},
    "expert": {"layers": [0, 2], "image_positions": "shared"},
    "llava": {},
    "xattn": {"layers": [0, 2]},
}
GO_ON = ("lora", "expert", "llava", "xattn")
"""Methods that leave the text before an image alone."""


@pytest.fixture(scope="module", params=RUNS)
def answerer(request: pytest.FixtureRequest, folder: Path) -> Answerer:
    method = request.param
    run = make_run(folder, folder / f"run-{method}", method, **RUNS[method])
    made = Answerer.load(run)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.workflows.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return made


def fresh(answerer: Answerer, dialogue: Dialogue) -> str:
    """The last answer once more, from the messages before it and with no cache."""
    return answerer.answers([dialogue.messages[:-1]], **SETTINGS)[0]


def test_every_turn_equals_a_fresh_run(answerer: Answerer, folder: Path) -> None:
    dialogue = Dialogue(answerer)
    turns = [("hello there", None), ("and what is this", "a.png"), ("which colour", None),
             ("and this one", "b.png"), ("both", None)]  # fmt: skip
    reused = []
    for text, image in turns:
        if image:
            dialogue.add_image(str(folder / image))
        before = dialogue._cache
        dialogue.say(text, **SETTINGS)
        reused.append(before is not None and dialogue._cache is before)
        assert dialogue.messages[-1]["content"] == fresh(answerer, dialogue)
    if answerer.model.workflow().graft.method not in GO_ON:
        assert reused[:2] == [False, False], "a first picture changes how the earlier text is read"


def test_a_dialogue_of_text_goes_on_with_an_image_where_text_stays(
    answerer: Answerer, folder: Path
) -> None:
    """An answer of one token is not in the cache, so no other ids can stand for it."""
    dialogue = Dialogue(answerer)
    dialogue.say("hello there", max_new_tokens=1, do_sample=False)
    before = dialogue._cache
    dialogue.add_image(str(folder / "a.png"))
    dialogue.say("and what is this", **SETTINGS)
    assert dialogue.messages[-1]["content"] == fresh(answerer, dialogue)
    assert (dialogue._cache is before) == (answerer.model.workflow().graft.method in GO_ON)


@pytest.mark.parametrize("edited", ["image", "question", "answer", "taken back"])
def test_a_dialogue_that_was_edited_is_read_anew(
    answerer: Answerer, folder: Path, edited: str
) -> None:
    """Another image takes the same positions, so that ids and kinds stay what they were."""
    dialogue = Dialogue(answerer)
    dialogue.add_image(str(folder / "a.png"))
    dialogue.say("what is it", **SETTINGS)
    dialogue.say("which colour", **SETTINGS)
    before = dialogue._cache
    if edited == "image":
        dialogue.messages[0]["content"][0]["image"] = str(folder / "b.png")
    elif edited == "question":
        dialogue.messages[0]["content"][1]["text"] = "what is he"
    elif edited == "answer":
        dialogue.messages[1]["content"] = "a word"
    else:
        del dialogue.messages[2:]
    dialogue.say("go on" if edited != "taken back" else "which", **SETTINGS)
    assert dialogue.messages[-1]["content"] == fresh(answerer, dialogue)
    assert dialogue._cache is not before or before is None


def test_an_image_is_shown_with_one_turn(answerer: Answerer, folder: Path) -> None:
    dialogue = Dialogue(answerer)
    names = [str(folder / name) for name in ("a.png", "b.png")]
    for name in names:
        dialogue.add_image(name)
    dialogue.say("what are these", **SETTINGS)
    dialogue.say("which colour", **SETTINGS)
    dialogue.add_image(names[1])
    dialogue.say("and this", **SETTINGS)
    shown = [
        [part["image"] for part in turn["content"] if part["type"] == "image"]
        if isinstance(turn["content"], list)
        else []
        for turn in dialogue.messages[::2]
    ]
    assert shown == [names, [], names[1:]]
    assert dialogue.waiting == []


def test_text_turns_are_the_base_itself(answerer: Answerer, folder: Path) -> None:
    dialogue = Dialogue(answerer)
    dialogue.say("hello there", **SETTINGS)
    said = dialogue.say("go on", **SETTINGS)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    ids = tokenizer.apply_chat_template(
        dialogue.messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = base.generate(ids, **SETTINGS, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == said


def test_a_turn_that_fails_leaves_nothing_behind(answerer: Answerer, folder: Path) -> None:
    dialogue = Dialogue(answerer)
    dialogue.add_image(str(folder / "a.png"))
    dialogue.say("what is it", **SETTINGS)

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dialogue.say("and is this a word or more of them", on_text=stop, **SETTINGS)
    assert dialogue.say("which colour", **SETTINGS) == fresh(answerer, dialogue)


def test_beams_leave_no_cache_for_the_next_turn(answerer: Answerer, folder: Path) -> None:
    dialogue = Dialogue(answerer)
    dialogue.add_image(str(folder / "a.png"))
    dialogue.say("what is it", num_beams=2, **SETTINGS)
    assert dialogue.say("which colour", **SETTINGS) == fresh(answerer, dialogue)


def test_pieces_make_up_the_answer(answerer: Answerer, folder: Path) -> None:
    pieces: list[str] = []
    dialogue = Dialogue(answerer)
    dialogue.add_image(str(folder / "a.png"))
    answer = dialogue.say("what is it", on_text=pieces.append, **SETTINGS)
    assert "".join(pieces).strip() == answer


def test_a_missing_picture_changes_nothing(answerer: Answerer) -> None:
    dialogue = Dialogue(answerer)
    with pytest.raises(UsageError, match=r"no\.png"):
        dialogue.add_image("no.png")
    assert dialogue.waiting == []
    assert dialogue.messages == []


def test_clear_forgets(answerer: Answerer) -> None:
    dialogue = Dialogue(answerer)
    first = dialogue.say("hello", **SETTINGS)
    dialogue.clear()
    assert dialogue.say("hello", **SETTINGS) == first


def test_a_batch_answers_as_one_by_one(answerer: Answerer, folder: Path) -> None:
    image = {"type": "image", "image": str(folder / "a.png")}
    rows = [
        [{"role": "user", "content": [image, {"type": "text", "text": "what"}]}],
        [{"role": "user", "content": "a longer question without any picture"}],
        [{"role": "user", "content": [image, image, {"type": "text", "text": "two of them"}]}],
    ]
    together = answerer.answers(rows, **SETTINGS)
    assert together == [answerer.answers([row], **SETTINGS)[0] for row in rows]


def test_the_prompt_ends_with_the_last_question() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert prompt_of(turns, "row 1") == turns[:1]
    with pytest.raises(UsageError, match="row 1"):
        prompt_of(turns[1:], "row 1")
