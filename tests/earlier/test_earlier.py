"""Load, compute, go on with and export what earlier versions wrote.

The kept folders are as commit 8074945 wrote them (`make.py`). A rebuild that reads a key otherwise,
fills a default that was another, or goes on from a checkpoint at another row shows here.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from earlier import kinds
from mmgraft import GraftedModel
from unchanged import conditions, stopped, training
from unchanged.comparing import differences
from unchanged.parts import command

EXPECTED = json.loads((kinds.KEPT / "expected.json").read_text(encoding="utf-8"))
EXACT = EXPECTED["made_with"] == conditions.present()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return kinds.unpack(tmp_path / "here")


def check(expected: Any, now: Any, exact: bool = EXACT) -> None:
    found = list(differences(expected, now, exact))
    if found:
        pytest.fail("\n".join(found[:25]), pytrace=False)


def load(folder: Path, capfd: pytest.CaptureFixture[str]) -> GraftedModel:
    """The model; loading may say one line, of what is read otherwise than it was written."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        model = GraftedModel.from_pretrained(folder)
    if shown:
        logging.enable_progress_bar()
    out, err = capfd.readouterr()
    said = [*out.splitlines(), *err.splitlines(), *(str(one.message) for one in warned)]
    assert len(said) <= 1, said
    return model


@pytest.mark.parametrize("name", kinds.LOADED)
def test_it_loads_and_computes_what_it_did(name: str, here: Path, capfd: Any) -> None:
    model = load(here / name, capfd)
    check(EXPECTED["logits"][name], kinds.logits(model))


@pytest.mark.parametrize("name", kinds.LOADED)
def test_it_is_exported_as_a_graft(name: str, here: Path, capfd: Any) -> None:
    command("export", here / name, "--to", "graft", "--out", here / "exported")
    check(EXPECTED["logits"][name], kinds.logits(load(here / "exported", capfd)))


@pytest.mark.parametrize("name", kinds.LOADED)
def test_it_is_exported_to_stock_llava(name: str, here: Path) -> None:
    """The command compares the logits itself; what LLaVA cannot be is refused as it was."""
    code = 0 if name in kinds.TO_LLAVA else 2
    command("export", here / name, "--to", "llava", "--out", here / "exported", code=code)
    assert (here / "exported" / "model.safetensors").is_file() == (code == 0)


@pytest.mark.parametrize("name", ["wings", kinds.TRAINED_BASE])
def test_it_is_exported_whole(name: str, here: Path, capfd: Any) -> None:
    command("export", here / name, "--to", "full", "--out", here / "exported")
    for part in ("base", "tower"):
        shutil.rmtree(here / part)
    check(EXPECTED["logits"][name], kinds.logits(load(here / "exported", capfd)))


def test_a_full_export_needs_nothing_beside_it(here: Path, capfd: Any) -> None:
    alone = shutil.move(here / kinds.FULL, here.parent / "alone")
    shutil.rmtree(here)
    check(EXPECTED["logits"][kinds.FULL], kinds.logits(load(Path(alone), capfd)))


def test_a_stopped_run_goes_on_to_its_end(here: Path) -> None:
    with conditions.one_thread():
        stopped.go_on(here / kinds.STOPPED)
    # Wings' learners sum in another order since: one call with a mask, not one for each piece.
    check(EXPECTED["resumed"], training.outcome(here / kinds.STOPPED), exact=False)


@pytest.mark.parametrize("name", [kinds.STOPPED, kinds.TRAINED_BASE])
def test_a_run_is_not_begun_again_by_mistake(name: str, here: Path) -> None:
    said = command("train", here / name, "--device", "cpu", code=2)
    assert "--restart" in said


def test_what_is_kept_is_small() -> None:
    files = [path for path in kinds.KEPT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
