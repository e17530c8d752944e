"""Load grafts by their folder as transformers' Auto classes, pipelines and lm-eval do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from mmgraft import GraftedModel
from mmgraft.basefiles import resolve
from mmgraft.errors import UsageError
from mmgraft.inference import Answerer
from mmgraft.model import auto
from mmgraft.model.auto.processor import GraftedProcessor
from tiny_runs import make_parts, make_run
from tiny_towers import picture

SEEN, OTHER = picture(16, 16), Image.new("RGB", (20, 16), (30, 200, 40))


def chat(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("auto"), "qwen2")
    make_run(folder, folder / "run", "iaa")
    return folder


@pytest.fixture(scope="module")
def run(parts: Path) -> Path:
    return parts / "run"


@pytest.fixture(scope="module")
def processor(run: Path) -> GraftedProcessor:
    return AutoProcessor.from_pretrained(run)


@pytest.fixture(scope="module")
def answerer(run: Path) -> Answerer:
    return Answerer.load(run)


def test_configs_are_told_when_transformers_imports_them() -> None:
    name = "transformers.models.auto.configuration_auto"
    watch = auto._Watch()
    assert watch.find_spec("transformers.models.auto.modeling_auto", None) is None
    spec = watch.find_spec(name, transformers.models.auto.__path__)
    fresh: Any = module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.CONFIG_MAPPING["mmgraft"].__name__ == "GraftedConfig"


def test_a_process_without_the_import_is_told_of_an_unknown_type(run: Path) -> None:
    """Import mmgraft late, and it is known."""
    code = (
        "from transformers import AutoConfig\n"
        f"try: AutoConfig.from_pretrained({str(run)!r})\n"
        "except ValueError as error: print(error)\n"
        f"import mmgraft; print(AutoConfig.from_pretrained({str(run)!r}).model_type)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has model type `mmgraft` but Transformers does not recognize" in done.stdout
    assert done.stdout.endswith("\nmmgraft\n"), done.stderr


def test_a_processor_can_be_shown(run: Path) -> None:
    shown = repr(AutoProcessor.from_pretrained(run))
    assert shown.startswith("GraftedProcessor(")
    assert "vocab_size" in shown


def test_the_config_is_the_bases_in_a_shell(run: Path, parts: Path) -> None:
    config, base = AutoConfig.from_pretrained(run), AutoConfig.from_pretrained(parts / "base")
    assert config.get_text_config().to_dict()["hidden_size"] == base.hidden_size
    assert type(config.text_config) is type(base)
    assert (config.vocab_size, config.eos_token_id) == (base.vocab_size, base.eos_token_id)
    record = json.loads((run / "graft_config.json").read_text())
    assert config.image_token_id == record["image_token"]["id"]
    assert GraftedModel.from_pretrained(run).config.image_token_id == config.image_token_id


@pytest.mark.parametrize("kind", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_a_model_is_loaded_as_asked(run: Path, parts: Path, tmp_path: Path, kind: Any) -> None:
    shutil.copytree(parts / "base", tmp_path / "moved")
    model = kind.from_pretrained(
        run, dtype=torch.float64, attn_implementation="eager", base=str(tmp_path / "moved"),
        device_map={"": "cpu"}, graft_dtype=torch.float32, verify="off", revision="main",
    )  # fmt: skip
    assert type(model) is GraftedModel
    assert model.dtype == torch.float64
    assert model.base.config._attn_implementation == "eager"
    assert model.base.name_or_path == str(tmp_path / "moved")
    assert next(model.workflow().projector.parameters()).dtype == torch.float32
    assert (model.answers is None) == (kind is AutoModelForCausalLM)
    assert model.name_or_path == str(run)


@pytest.mark.parametrize(
    "options",
    [{"quantization_config": {"load_in_4bit": True}}, {"load_in_8bit": True}, {"torch_dtyp": "x"},
     {"max_memory": {0: "1GB"}}, {"cache_dir": "there"}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_an_option_that_it_does_not_take_is_named(run: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"takes no keyword '{next(iter(options))}'"):
        AutoModelForImageTextToText.from_pretrained(run, **options)


def test_an_older_folder_is_still_loaded(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old" / "config.json").unlink()
    model = GraftedModel.from_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new/config.json").read_text() == (run / "config.json").read_text()


def test_a_graft_is_no_base(run: Path) -> None:
    with pytest.raises(UsageError, match="is a graft, not a base"):
        resolve(run)


def test_the_tokenizer_is_the_bases(run: Path, parts: Path) -> None:
    found = AutoTokenizer.from_pretrained(run, padding_side="left", base=str(parts / "base"))
    assert found.get_vocab() == AutoTokenizer.from_pretrained(parts / "base").get_vocab()
    assert found.padding_side == "left"


def test_a_pipeline_answers_as_the_graft_does(run: Path, answerer: Answerer) -> None:
    pipe = pipeline("image-text-to-text", str(run), dtype="float32")
    asked: dict[str, Any] = {"max_new_tokens": 6, "return_full_text": False}

    def said(**given: Any) -> str:
        asked["generate_kwargs"] = {"do_sample": False}  # the pipeline adds to it
        return pipe(**given, **asked)[0]["generated_text"].strip()

    own = [
        answerer.answers([chat(*one)], max_new_tokens=6, do_sample=False)[0]
        for one in (("which colour?", SEEN), ("compare", SEEN, OTHER), ("hello",))
    ]
    assert said(text=chat("which colour?", SEEN)) == own[0]
    assert said(images=SEEN, text="which colour?") == own[0]
    assert said(text=chat("compare", SEEN, OTHER)) == own[1]
    assert said(images=[SEEN, OTHER], text="compare") == own[1]
    written = pipe.processor.apply_chat_template(chat("compare", SEEN, OTHER), True)
    assert written.count("<image>") == 2
    assert said(images=[SEEN, OTHER], text=written) == own[1]
    assert said(text=chat("hello")) == own[2]
    assert own[0] != own[2]


@pytest.mark.parametrize(
    "text", ["red and", ["red", "blue or green"], [{"role": "user", "content": "why?"}]]
)
def test_a_text_pipeline_is_the_bases(run: Path, parts: Path, text: Any) -> None:
    found = [
        pipeline("text-generation", str(folder))(text, max_new_tokens=6, do_sample=False)
        for folder in (run, parts / "base")
    ]
    assert found[0] == found[1]


def test_texts_and_images_of_a_batch_belong_together(processor, answerer) -> None:
    texts, images = ["one?", "two of them?", "none"], [[SEEN], [OTHER, SEEN], []]
    wanted = answerer.processor([chat("one?", SEEN), chat("two of them?", OTHER, SEEN)])
    found = processor(images=images[:2], text=texts[:2], padding="longest", return_tensors="pt")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(UsageError, match="3 texts, images of 2"):
        processor(images=images[:2], text=texts)
    with pytest.raises(UsageError, match="2 images and 1 times <image>"):
        processor(images=[SEEN, OTHER], text="<image> one")
    with pytest.raises(UsageError, match="takes no truncation, max_length"):
        processor(text="one", truncation=True, max_length=7)


def test_a_prompt_stands_as_it_is(processor: GraftedProcessor, parts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts / "base")
    text = "an <image> of [image]"
    assert processor(text=text)["input_ids"].tolist() == [tokenizer(text)["input_ids"]]
    row = processor(images=[SEEN], text=text)
    kinds = row["mm_token_type_ids"][0].bool()
    around = [tokenizer(one)["input_ids"] for one in ("an ", " of [image]")]
    assert row["input_ids"][0][~kinds].tolist() == [*around[0], *around[1]]
    assert kinds.nonzero()[0].item() == len(around[0])


def test_a_first_token_stands_once() -> None:
    from mmgraft.data.chat.processor import GraftProcessor
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer("llama")
    made = GraftProcessor(tokenizer, 4, 1)
    prefix = made._copies.prefix
    begin = tokenizer.decode(prefix)
    assert made.encode_prompt("a word").input_ids[: len(prefix)] == prefix
    assert made.encode_prompt(begin + "a word") == made.encode_prompt("a word")


def test_what_a_template_cannot_do_is_refused(processor: GraftedProcessor) -> None:
    for option in ("continue_final_message", "chat_template", "enable_thinking"):
        with pytest.raises(UsageError, match=option):
            processor.apply_chat_template(chat("hello"), **{option: "yes"})
    with pytest.raises(UsageError, match="tokenize=True"):
        processor.apply_chat_template(chat("an <image> word", SEEN))
    nothing = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    both = processor.apply_chat_template([nothing, nothing], add_generation_prompt=True)
    assert [text.count("<image>\nwhat?") for text in both] == [1, 1]


def test_lm_eval_gives_the_bases_scores(run: Path, parts: Path, answerer: Answerer) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    def of(kind: str, folder: Path) -> Any:
        given = {"pretrained": str(folder), "dtype": "float32"}
        return get_model(kind).create_from_arg_obj(given, {"batch_size": 2, "device": "cpu"})

    pairs = [("hello there", " which one"), ("a b c", " d e"), ("", "what colour is it")]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    until = Instance("generate_until", {}, ("hello", {"until": ["\n"], "max_gen_toks": 6}), 0)
    base, graft, sees = of("hf", parts / "base"), of("hf", run), of("hf-multimodal", run)
    scores = base.loglikelihood(asked)
    assert graft.loglikelihood(asked) == scores
    assert sees.loglikelihood(asked) == scores
    assert graft.max_length == base.max_length == 128
    assert graft.generate_until([until]) == base.generate_until([until])
    text = sees.apply_chat_template([{"role": "user", "content": "<image>which colour?"}])
    settings = {"until": ["never"], "max_gen_toks": 5, "do_sample": False}
    seen = Instance("generate_until", {}, (text, settings, {"visual": [SEEN]}), 0)
    own = answerer.answers([chat("which colour?", SEEN)], max_new_tokens=5, do_sample=False)
    assert [one.strip() for one in sees.generate_until([seen])] == own


def test_transformers_own_server_loads_a_graft(run: Path, answerer: Answerer) -> None:
    """Name the folder as the model: it answers as `mmgraft chat` does."""
    import base64
    import inspect
    import io

    from fastapi.testclient import TestClient
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    models, state = ModelManager(device="cpu"), GenerationState()
    handlers = [name for name in inspect.signature(build_server).parameters if "handler" in name]
    given: dict[str, Any] = dict.fromkeys(handlers)
    given["chat_handler"] = ChatCompletionHandler(models, state)
    file = io.BytesIO()
    SEEN.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    own = [chat("which colour?", SEEN), chat("hello")]
    for messages, parts in zip(own, ([image], []), strict=True):
        turn = {"role": "user", "content": [*parts, messages[0]["content"][-1]]}
        body = {"model": str(run), "messages": [turn], "max_tokens": 5}
        with TestClient(build_server(models, **given, generation_state=state)) as client:
            reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        said = reply.json()["choices"][0]["message"]["content"]
        assert [said.strip()] == answerer.answers([messages], max_new_tokens=5)
