"""Real models, out of packages: SmolLM2-135M-Instruct, Gemma-3-270M, EfficientNet-Lite2.

They are converted once a machine, into mmgraft's cache, by whichever test process comes first.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.demo import assets
from mmgraft.inference import Answerer
from mmgraft.model.files.load import load_processor
from mmgraft.model.modeling import GraftedModel
from mmgraft.vision.spec import VisionSpec

TOWER = VisionSpec(kind="efficientnet-lite2", options={"image_size": 96})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All in one process: the models are large, and each is loaded once."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("real"))


@dataclass
class Real:
    """A real base, its grafts on disk, and what was loaded of them.

    Attributes:
        folder: The base.
        grafts: Folder of the graft of each method.
        keep: How many loaded models of a kind stay in memory.
        own: How far decoding of the stock base is from its full forward, by precision.
    """

    folder: Path
    grafts: dict[str, Path]
    keep: int
    own: dict[str, float] = field(default_factory=dict)
    _stock: dict[str, PreTrainedModel] = field(default_factory=dict)
    _processor: GraftProcessor | None = None
    _grafted: dict[tuple[str, str], GraftedModel] = field(default_factory=dict)

    def stock(self, dtype: str) -> PreTrainedModel:
        """The base as transformers loads it, nothing of mmgraft near it; `nf4` is 4-bit."""
        if dtype not in self._stock:
            self._make_room(self._stock)
            options = {"dtype": getattr(torch, dtype)} if dtype != "nf4" else _nf4()
            self._stock[dtype] = AutoModelForCausalLM.from_pretrained(self.folder, **options).eval()
        return self._stock[dtype]

    def grafted(self, method: str, dtype: str) -> GraftedModel:
        """A graft loaded from disk, its tensors moved as if it were trained."""
        if (method, dtype) not in self._grafted:
            self._make_room(self._grafted)
            options = {"dtype": dtype} if dtype != "nf4" else {"quantization": "nf4"}
            self._grafted[method, dtype] = _moved(
                GraftedModel.from_pretrained(self.grafts[method], **options)
            )
        return self._grafted[method, dtype]

    def forget(self) -> None:
        """Free the memory: the next models are large, too."""
        self._stock.clear()
        self._grafted.clear()
        self._processor = None  # a vocabulary of 262,144 entries, and copies of it
        self.__dict__.pop("tokenizer", None)
        gc.collect()

    def _make_room(self, loaded: dict) -> None:
        while len(loaded) >= self.keep:
            del loaded[next(iter(loaded))]

    def answerer(self, method: str, dtype: str) -> Answerer:
        """A graft with its processor."""
        model = self.grafted(method, dtype)
        if self._processor is None:  # the same for every graft, and a large tokenizer is slow
            tower = model.vision_tower
            assert tower is not None
            record = model.workflow().record
            self._processor = load_processor(record, self.folder, tower)
        return Answerer(model, self._processor)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's own."""
        return AutoTokenizer.from_pretrained(self.folder)


def _nf4() -> dict[str, object]:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "dtype": "auto"}


@torch.no_grad()
def _moved(model: GraftedModel) -> GraftedModel:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.workflows.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_((0.02 * noise).to(parameter.dtype))
    return model


def _needs(*packages: assets.Package) -> None:
    missing = [package.name for package in packages if package.folder is None]
    if missing:
        pytest.skip(f"not installed: pip install --no-deps {' '.join(missing)}")
    if find_spec("gguf") is None:
        pytest.skip("not installed: pip install 'mmgraft[gguf]'")


def _converted(convert: Callable[[], Path]) -> Path:
    """Convert once: other processes wait for the first."""
    cache = assets.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(cache).free < 3 * 2**30:
        pytest.skip(f"less than 3 GiB are free for converted models in {cache}")
    with FileLock(cache / ".lock"):  # torch brings filelock
        return convert()


def _grafts(base: Path, root: Path, *more: str) -> dict[str, Path]:
    """Grafts as the command makes them."""
    from mmgraft.cli.app import run

    options = {
        "iaa": ["--method", "iaa", "--layers", "5,12", "--no-embedding", "--no-head"],
        "wings": ["--method", "wings", "--layers", "every:6", "--rank", "16"],
    }
    for method, given in options.items():
        out = ["--vision", TOWER.kind, "--out", str(root / method)]
        assert run(["graft", str(base), *given, *out, *more]) == 0
    return {method: root / method for method in options}


@pytest.fixture(scope="class")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    _needs(assets.LANGUAGE, *assets.VISION)
    base = _converted(assets.smollm2)
    real = Real(base, _grafts(base, tmp_path_factory.mktemp("smollm2")), keep=2)
    yield real
    real.forget()


@pytest.fixture(scope="class")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """Gemma-3-270M, the base model: it has no chat template."""
    _needs(*assets.GEMMA, *assets.VISION)
    base = _converted(assets.gemma3_270m)
    grafts = _grafts(base, tmp_path_factory.mktemp("gemma"), "--template", "plain")
    real = Real(base, grafts, keep=1)
    yield real
    real.forget()
