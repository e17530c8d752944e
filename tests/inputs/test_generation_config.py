"""Check what may stand in a base's generation config, and what of it a greedy answer may follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from grafting import CONFIGS, perturb
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.evaluation.generate.answers import answer
from mmgraft.inference import Answerer, Dialogue
from mmgraft.model.modeling import GraftedModel
from tiny import save_base, tiny_model, tiny_tower
from tiny_runs import make_parts, make_run, write_recipe
from tiny_tokenizer import CHATML, EOS_ID, IM_END_ID, tiny_tokenizer
from tiny_towers import picture

THINKING = CHATML.replace(
    "message['content'] +",
    "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' and not "
    "brief is defined else '') + message['content'] +",
)
SEEN = [{"type": "image", "image": picture()}, {"type": "text", "text": "Which colour?"}]
CHATS = [[{"role": "user", "content": SEEN}], [{"role": "user", "content": "Which one?"}]]


def _made() -> Answerer:
    tower = tiny_tower()
    model = perturb(
        GraftedModel.graft(tiny_model("llama"), tower, CONFIGS["llava"], tokenizer=None)
    )
    model.base.generation_config = model.generation_config = GenerationConfig(eos_token_id=EOS_ID)
    processor = GraftProcessor(tiny_tokenizer(), tower.num_patches, 5, "chat", tower.preprocess)
    return Answerer(model, processor)


def _ids(answerer: Answerer, chat: Any, **settings: Any) -> list[int]:
    inputs = answerer.processor(chat)
    out = answerer.model.generate(**inputs, **answerer.settings(max_new_tokens=6, **settings))
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def greedy() -> tuple[Answerer, list[list[int]], list[str]]:
    answerer = _made()
    ids = [_ids(answerer, chat, do_sample=False) for chat in CHATS]
    return answerer, ids, [answerer.processor.answer(each) for each in ids]


@pytest.mark.parametrize(
    "setting",
    [
        lambda first: {"repetition_penalty": 50.0},
        lambda first: {"no_repeat_ngram_size": 1},
        lambda first: {"suppress_tokens": [first]},
        lambda first: {"begin_suppress_tokens": [first]},
        lambda first: {"bad_words_ids": [[first]]},
        lambda first: {"sequence_bias": [[[first], -1e4]]},
        lambda first: {"forced_eos_token_id": 9},
        lambda first: {"num_beams": 4},
        lambda first: {"do_sample": True, "temperature": 5.0, "top_k": 3},
    ],
)
def test_greedy_answers_are_the_likeliest_tokens(greedy: Any, setting: Any) -> None:
    answerer, ids, texts = greedy
    model = answerer.model
    before = model.generation_config
    found = []
    for chat, likeliest, text in zip(CHATS, ids, texts, strict=True):
        config = GenerationConfig(eos_token_id=EOS_ID, **setting(likeliest[0]))
        model.generation_config = model.base.generation_config = config
        found.append(_ids(answerer, chat) != likeliest)
        settings = {"max_new_tokens": 6, "do_sample": False}
        assert answerer.answers([chat], **settings) == [text]
        assert answer(model, answerer.processor, [chat], max_new_tokens=6) == [text]
        assert model.generation_config is model.base.generation_config is config
        given = answerer.answers([chat], suppress_tokens=[likeliest[0]], **settings)
        assert given != [text], "what is given to generate itself holds"
    assert any(found) or "num_beams" in setting(0), "the setting changes what is generated"
    model.generation_config = model.base.generation_config = before


@pytest.mark.parametrize(
    "setting",
    [{"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3},
     {"num_return_sequences": 3, "do_sample": True}, {"stop_strings": ["a"]},
     {"return_dict_in_generate": True}, {"token_healing": True}, {"force_words_ids": [[7]]},
     {"max_length": 3}],
)  # fmt: skip
@pytest.mark.parametrize("sampled", [False, True])
def test_how_a_base_would_generate_does_not_stop_a_dialogue(setting: Any, sampled: bool) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": sampled, "temperature": None}
    settings |= {"temperature": 3.0} if sampled else {}
    said = []
    for given in ({}, setting):
        answerer = _made()
        config = GenerationConfig(eos_token_id=EOS_ID, repetition_penalty=1.5, **given)
        answerer.model.generation_config = answerer.model.base.generation_config = config
        dialogue = Dialogue(answerer)
        torch.manual_seed(3)
        for text in ("Which one?", "And now?"):
            said.append(dialogue.say(text, on_text=lambda piece: None, **settings))
        said += answerer.answers([CHATS[0]], **settings)
    assert said[:3] == said[3:]


@pytest.mark.parametrize("own", [EOS_ID, [EOS_ID, 7], None])
@pytest.mark.parametrize("chat", CHATS, ids=["image", "text"])
def test_a_turns_end_ends_an_answer_beside_the_bases_own(chat: Any, own: Any) -> None:
    answerer = _made()
    model = answerer.model
    model.generation_config.eos_token_id = own
    ends = {IM_END_ID, *([own] if isinstance(own, int) else own or ())}
    for index in ends:
        said = _ids(answerer, chat, do_sample=False, sequence_bias={(index,): 1e4})
        assert said == [index]
    longer = _ids(answerer, chat, do_sample=False, sequence_bias={(9,): 1e4})
    assert longer == [9] * 6
    given = _ids(answerer, chat, eos_token_id=9, sequence_bias={(IM_END_ID,): 1e4})
    assert given == [IM_END_ID] * 6, "ends that a caller gives are the only ones"


def test_a_turn_that_ends_in_words_ends_an_answer() -> None:
    answerer = _made()
    text = CHATML.replace("<|im_end|>", " dog")
    answerer = Answerer(
        answerer.model,
        GraftProcessor(tiny_tokenizer(text), 4, 5, "chat", answerer.processor.preprocess),
    )
    (dog,) = answerer.processor.tokenizer(" dog", add_special_tokens=False)["input_ids"][-1:]
    for chat in CHATS:
        assert _ids(answerer, chat, sequence_bias={(dog,): 1e4})[-1] == dog
        assert len(_ids(answerer, chat, sequence_bias={(dog,): 1e4})) < 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("answers"))
    tiny_tokenizer(THINKING).save_pretrained(folder / "base")
    stages = [{"name": "s", "train": ["projector"], "lr": 1e-3, "max_steps": 1}]
    write_recipe(make_run(folder, folder / "run", "llava"), folder, "llava", stages)
    return folder


def _says(monkeypatch: pytest.MonkeyPatch, text: str) -> list[dict[str, Any]]:
    """Let every model say a text, and give what each was asked with."""
    asked: list[dict[str, Any]] = []

    def generate(self: Any, inputs: Any = None, **kwargs: Any) -> torch.Tensor:
        ids = inputs if inputs is not None else kwargs["input_ids"]
        said = torch.tensor(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])
        asked.append({**kwargs, "ids": ids, "config": self.generation_config})
        if kwargs.get("streamer"):
            kwargs["streamer"].put(ids)
            for one in said:
                kwargs["streamer"].put(one[None])
            kwargs["streamer"].end()
        return torch.cat([ids, said.expand(len(ids), -1)], dim=1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setattr(Dialogue, "_caches", lambda *_: False)
    return asked


def test_commands_show_the_answer_without_its_reasoning(cli, parts: Path, monkeypatch) -> None:
    run, image = parts / "run", parts / "images" / "0.png"
    asked = _says(monkeypatch, "<think>\nIt is warm.\n</think>\n\nred<|im_end|>")
    chat = ["chat", run, "which?", "--image", image]
    assert cli(*chat).out == "red\n"
    assert json.loads(cli(*chat, "--json").out)["answer"] == "red"
    assert "It is warm." in cli(*chat, "--show-reasoning").out
    out = parts / "out.jsonl"
    for flags, said in (
        ([], "red"),
        (["--show-reasoning"], "<think>\nIt is warm.\n</think>\n\nred"),
    ):
        ran = cli("generate", run, parts / "rows.jsonl", "--images", parts / "images", "--out", out,
                  "--force", *flags)  # fmt: skip
        assert ran.code == 0, ran.err
        assert {json.loads(line)["answer"] for line in out.read_text().splitlines()} == {said}
    rows = parts / "rows.jsonl"
    ran = cli("eval", run, "--data", rows, "--images", parts / "images", "--metric", "vqa",
              "--vision", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert {one["eos_token_id"][-1] for one in asked} == {IM_END_ID}
    _says(monkeypatch, "<think>\nIt is")
    ran = cli("eval", run, "--data", rows, "--images", parts / "images", "--metric", "exact",
              "--vision", "--name", "cut")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "12 of 12 answers are empty; where reasoning did not end, raise" in ran.err
    assert all(one["config"].repetition_penalty is None for one in asked)


def test_template_options_are_recorded_and_used_everywhere(cli, parts: Path, monkeypatch) -> None:
    run, rows = make_run(parts, parts / "brief", "llava"), parts / "rows.jsonl"
    stages = [{"name": "s", "train": ["projector"], "lr": 1e-3, "max_steps": 1}]
    write_recipe(run, parts, "llava", stages, template_options={"brief": True})
    preview = ["data", "preview", rows, "--images", parts / "images", "--json"]
    assert "think" in cli(*preview, "--base", parts / "base", "--vision", parts / "tower").out
    given = ["--template-option", "brief=true"]
    ran = cli(*preview, "--base", parts / "base", "--vision", parts / "tower", *given)
    assert "think" not in ran.out
    assert "think" not in cli("data", "preview", run, "--json").out
    assert cli("train", run, "--device", "cpu").code == 0
    record = json.loads((run / "graft_config.json").read_text())
    assert record["template"]["options"] == {"brief": True}
    assert record["recipe"]["template_options"] == {"brief": True}
    assert Answerer.load(run).processor.options == {"brief": True}


@pytest.mark.parametrize(
    "command",
    [
        ["graft", "base", "--method", "llava", "--vision", "tower", "--out", "new"],
        ["chat", "run", "hello"],
        ["generate", "run", "rows.jsonl", "--images", "images", "--out", "new"],
        ["eval", "run", "--data", "rows.jsonl", "--images", "images", "--metric", "vqa"],
        ["data", "check", "rows.jsonl", "--run", "run", "--images", "images"],
        ["data", "preview", "rows.jsonl", "--run", "run", "--images", "images"],
        ["train", "run", "--set", "template_options.brif=true"],
    ],
)
def test_unknown_options_are_refused_before_anything_is_written(
    cli, parts: Path, monkeypatch, command: list[str]
) -> None:
    monkeypatch.chdir(parts)
    before = sorted(parts.rglob("*"))
    given = [] if command[0] == "train" else ["--template-option", "brif=true"]
    ran = cli(*command, *given)
    assert ran.code == 2
    assert (
        "template option 'brif': the template has no such variable; did you mean 'brief'?"
        in ran.err
    )
    assert sorted(parts.rglob("*")) == before
    if given:
        ran = cli(*command, "--template-option", "brief")
        assert ran.code == 2
        assert "--template-option brief: write key=value" in ran.err


def test_one_of_several_templates_is_chosen_by_its_name(cli, parts: Path) -> None:
    base = save_base(parts / "named", "llama", tokenizer=False)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"rag": CHATML, "tool_use": THINKING}
    tokenizer.save_pretrained(base)
    command = ["graft", base, "--method", "llava", "--vision", parts / "tower"]
    refused = cli(*command, "--out", parts / "none")
    assert refused.code == 2
    assert "called rag, tool_use, and none is the default; choose one" in refused.err
    unknown = cli(*command, "--out", parts / "none", "--template", "rags")
    assert unknown.code == 2
    assert "write chat, plain, rag, tool_use or the path" in unknown.err
    assert not (parts / "none").exists()
    assert cli(*command, "--out", parts / "chosen", "--template", "tool_use").code == 0
    record = json.loads((parts / "chosen" / "graft_config.json").read_text())
    assert record["template"] == {"kind": "file", "text": THINKING, "options": {}}


@pytest.mark.parametrize(
    "setting",
    [{"eos_token_id": "1"}, {"eos_token_id": [1, "2"]}, {"pad_token_id": True}, {"top_k": "50"},
     {"temperature": "0.7"}, {"repetition_penalty": {}}, {"suppress_tokens": ["x"]},
     {"min_length": "x"}, {"no_repeat_ngram_size": "2"}, {"max_new_tokens": "20"}],
)  # fmt: skip
def test_text_where_a_number_belongs_is_refused(cli, parts: Path, setting: dict[str, Any]) -> None:
    path = parts / "base" / "generation_config.json"
    before = path.read_bytes() if path.exists() else None
    path.write_text(json.dumps(setting))
    ran = cli("chat", parts / "run", "which?")
    ((name, value),) = setting.items()
    assert (ran.code, ran.out) == (2, "")
    assert f"generation_config.json has {value!r} as {name}; write a number" in ran.err
    path.write_bytes(before) if before is not None else path.unlink()


def test_numbers_and_names_in_a_generation_config_are_read(cli, parts: Path) -> None:
    path = parts / "base" / "generation_config.json"
    before = path.read_bytes() if path.exists() else None
    good = {"eos_token_id": [1, 2], "top_k": 50, "temperature": 0.7, "suppress_tokens": None,
            "_from_model_config": True, "transformers_version": "4.40.0"}  # fmt: skip
    path.write_text(json.dumps(good))
    assert cli("chat", parts / "run", "which?", "--max-new-tokens", 1).code == 0
    path.write_bytes(before) if before is not None else path.unlink()


@pytest.mark.parametrize("flag", ["--temperature", "--top-p"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_number_of_a_sampled_answer_is_refused(cli, parts: Path, flag: str, value: str) -> None:
    ran = cli("chat", parts / "run", "which?", "--temperature", "0.7", flag, value)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    assert any(said in ran.err for said in ("Invalid value", f"temperature is {value}")), ran.err


@pytest.mark.parametrize("words", [["a\udcffb"], ["which?", "--system", "\ud83d"]])
def test_half_a_character_on_the_command_line_is_named(cli, parts: Path, words: list[str]) -> None:
    """A terminal's bytes that are no UTF-8 come as such; tokenizers take none."""
    ran = cli("chat", parts / "run", *words)
    assert (ran.code, ran.out) == (2, "")
    assert "half a character" in ran.err
