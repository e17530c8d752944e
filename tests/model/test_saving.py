"""Check what a save leaves behind: weights, config and a trained base are all old or all new."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crashes import Killed, every_step, full_at, killed_at
from grafting import CONFIGS, fresh
from mmgraft.basefiles import TensorReader
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.model.files.graft_file import BaseReference, GraftFile, ImageToken
from mmgraft.model.files.load import base_files, check_base, read_tensors
from mmgraft.model.files.save import graft_tensors, save_graft, write_graft
from mmgraft.model.modeling import GraftedModel
from mmgraft.vision.spec import VisionSpec
from tiny_runs import make_parts, make_run
from waiting import LAST

SHARD = 20_000
"""Bytes of two of the four tensors."""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: what is tested here does not outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write(folder: Path, number: int, shards: bool = False, tensors: int = 4) -> None:
    """A graft that says its number in every tensor and in its config."""
    record = GraftFile(
        method="llava",
        config={"method": "llava"},
        base=BaseReference(id="a/b"),
        vision=VisionSpec(id="a/c"),
        image_token=ImageToken(id=number),
    )
    values = {f"t{place}": torch.full((50, 50), float(number)) for place in range(tensors)}
    write_graft(folder, record, values, *([SHARD] if shards else []))


def number_of(folder: Path) -> int:
    """The number of the graft in a folder; it must be one and whole."""
    number = GraftFile.read(folder).image_token.id
    tensors = read_tensors(folder)
    assert tensors
    for name, tensor in tensors.items():
        assert tensor.shape == (50, 50), name
        assert (tensor == number).all(), name
    return number


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith("."))


FORMS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "one file": (lambda f: write(f, 1), lambda f: write(f, 2)),
    "shards": (lambda f: write(f, 1, True), lambda f: write(f, 2, True, tensors=3)),
    "into shards": (lambda f: write(f, 1), lambda f: write(f, 2, True)),
    "out of shards": (lambda f: write(f, 1, True), lambda f: write(f, 2)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("begin", [killed_at, full_at])
def test_a_stopped_save_leaves_one_whole_graft(tmp_path: Path, form: str, begin) -> None:
    folder = tmp_path / "run"
    before, after = FORMS[form]

    def save() -> None:
        after(folder)

    before(folder)
    (folder / "notes.txt").write_text("mine")
    found = []
    for raised in every_step(begin, save):
        if begin is full_at and raised is not None:
            assert isinstance(raised, MMGraftError)
            assert raised.exit_code == 1
        found.append(number_of(folder))
        assert raised is not None or found[-1] == 2
        if found[-1] == 1 and begin is full_at:
            assert hidden(folder) == []
        assert (folder / "notes.txt").read_text() == "mine"
        before(folder)
        assert number_of(folder) == 1
        assert hidden(folder) == []
    assert found == sorted(found), "a save that came further lost what an earlier stop had kept"
    assert {1, 2} == set(found)


def test_a_first_save_that_is_killed_can_be_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in every_step(killed_at, lambda: write(folder, 1)):
        if (folder / "graft_config.json").exists():
            assert number_of(folder) == 1
        write(folder, 2)
        assert number_of(folder) == 2
        shutil.rmtree(folder)


def test_names_of_shards_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, number, shards=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "graft-00001-of-00002.safetensors",
        "graft-00002-of-00002.safetensors",
        "graft.safetensors.index.json",
        "graft_config.json",
    ]
    write(tmp_path, 9)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "graft.safetensors",
        "graft_config.json",
    }
    assert (tmp_path / "graft.safetensors").stat().st_mode & 0o044 == 0o044  # others may read it


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@torch.no_grad()
def _set(model: GraftedModel, number: float) -> GraftedModel:
    model.base.get_input_embeddings().weight.fill_(number)
    for parameter in model.workflow().parameters():
        parameter.fill_(number)
    model.workflow().record.base_trained = True
    return model


@pytest.mark.parametrize("begin", [killed_at, full_at])
def test_a_trained_base_and_its_graft_stay_together(parts: Path, tmp_path: Path, begin) -> None:
    """A new base under an old config would be refused for good by its fingerprint."""
    run = make_run(parts, tmp_path / "run", "llava")
    model = GraftedModel.from_pretrained(run)
    save_graft(_set(model, 1.0), run)
    kept = tmp_path / "kept"
    shutil.copytree(run, kept)
    _set(model, 2.0)
    found = []
    for _ in every_step(begin, lambda: save_graft(model, run)):
        record = GraftFile.read(run)
        files = base_files(record, run)
        check_base(record, files, "fast")
        with TensorReader(files) as reader:
            number = float(reader.get("model.embed_tokens.weight")[0, 0])
        assert all((tensor == number).all() for tensor in read_tensors(run).values())
        found.append(number)
        shutil.rmtree(run)
        shutil.copytree(kept, run)
    assert found == sorted(found)
    assert set(found) == {1.0, 2.0}
    save_graft(model, run)
    assert float(GraftedModel.from_pretrained(run).base.get_input_embeddings().weight[0, 0]) == 2.0


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("method", CONFIGS)
def test_every_tensor_is_saved_once(arch: str, method: str) -> None:
    """Qwen2's head is its embedding: so is that of what IAA copies of it."""
    workflow = fresh(arch, method).workflow()
    found, wanted = graft_tensors(workflow), workflow.state_dict()
    repeated = {"graft.head.weight"} if (arch, method[:3]) == ("qwen2", "iaa") else set()
    assert found.keys() == wanted.keys() - repeated
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)


def test_a_trained_base_brings_its_tokenizer(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run = make_run(parts, tmp_path / "run", "llava")
    save_graft(_set(GraftedModel.from_pretrained(run), 1.0), tmp_path / "other")
    assert (tmp_path / "other" / "base" / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other" / "base")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(parts / "base").chat_template
    record = GraftFile.read(tmp_path / "other")
    assert (record.base.id, record.base_trained) == ("./base", True)
    assert record.trained_from == GraftFile.read(run).base
    assert GraftFile.read(run).base_trained is False
    save_graft(GraftedModel.from_pretrained(tmp_path / "other"), tmp_path / "again")
    assert GraftFile.read(tmp_path / "again").trained_from == record.trained_from


@pytest.mark.parametrize("method", ["iaa", "wings", "llava"])
def test_what_of_a_graft_runs_is_saved(parts: Path, tmp_path: Path, method: str) -> None:
    model = GraftedModel.from_pretrained(make_run(parts, tmp_path / "run", method))
    graft = model.workflow().graft
    before = graft.state()
    graft.set_state({**before, "active": False})
    assert graft.state() != before
    save_graft(model, tmp_path / "part")
    assert GraftFile.read(tmp_path / "part").state == graft.state()
    loaded = GraftedModel.from_pretrained(tmp_path / "part").workflow().graft
    assert loaded.state() == graft.state()


def test_a_base_held_in_4_bit_is_not_saved(parts: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = make_run(parts, tmp_path / "run", "llava")
    model = GraftedModel.from_pretrained(run, quantization="nf4")
    model.workflow().record.base_trained = True
    with pytest.raises(UsageError, match="4-bit"):
        save_graft(model, run)


REAL = """
import os, random, signal, sys, time
from pathlib import Path
from test_saving import number_of, write

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(seed)
write(folder, 0)
last = 0
for _ in range(15):
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        for number in range(last + 1, last + 10_000):
            os.write(tell, b".")  # this save begins, so the one before is done
            write(folder, number, shards=number % 3 == 0)
        os._exit(9)
    os.close(tell)
    begun = draw.randint(2, 4)
    for _ in range(begun):
        before = time.monotonic()
        assert os.read(told, 1) == b"."
    time.sleep(draw.uniform(0, 1.2) * (time.monotonic() - before))  # as long as a save takes here
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(told)
    found = number_of(folder)
    assert found >= last + begun - 1, (found, last, begun)
    last = found
print(last)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_real_kills_at_random_times(tmp_path: Path) -> None:
    """Also in the middle of writing a file, where nothing can be played.

    A child is killed when it has begun its second to fourth save, however long that takes, and a
    random part of a save later.
    """
    seed = random.randrange(10**6)
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(here), str(here.parent / 'support')]!r}\n{REAL}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), str(seed)],
        capture_output=True,
        text=True,
        timeout=LAST,
        cwd=here.parent.parent,
    )
    assert done.returncode == 0, (seed, done.stderr)
    assert int(done.stdout) >= 15
    write(tmp_path / "run", 7)
    assert hidden(tmp_path / "run") == []


def test_a_played_kill_reaches_nothing(tmp_path: Path) -> None:
    """The tests above hold only if their kill is one."""
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(1, patch)
        for act in (target.unlink, lambda: target.write_text("new"), lambda: shutil.rmtree(target)):
            with pytest.raises((Killed, NotADirectoryError)):
                act()
    assert target.read_text() == "old"
