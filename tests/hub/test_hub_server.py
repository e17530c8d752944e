"""The loopback Hub serves what transformers asks for, and behaves as the Hub where it matters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import EntryNotFoundError, get_session

from hub_fixtures import make_run
from hub_server import HubServer
from hub_xet import _lz4_block, _ungroup
from tiny import save_base
from waiting import LAST

LOAD = """
import sys
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-7B-Instruct")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-7B-Instruct")
processor = AutoImageProcessor.from_pretrained("google/siglip2-so400m-patch14-384")
ids = tokenizer("a square", return_tensors="pt")
print(type(model).__name__, float(model(**ids).logits.double().sum()), processor.size["height"])
"""


def test_transformers_loads_by_id_in_a_fresh_process(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipImageProcessor

    save_base(tmp_path / "base", "qwen2")
    size = {"height": 24, "width": 24}
    SiglipImageProcessor(size=size).save_pretrained(tmp_path / "tower")
    with HubServer() as hub:
        hub.add_model("Qwen/Qwen2-7B-Instruct", tmp_path / "base")
        hub.add_model("google/siglip2-so400m-patch14-384", tmp_path / "tower")
        done = subprocess.run(
            [sys.executable, "-c", LOAD],
            env=hub.env(tmp_path / "home", token=False),
            capture_output=True,
            text=True,
            timeout=LAST,
        )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = AutoTokenizer.from_pretrained(tmp_path / "base")("a square", return_tensors="pt")
    with torch.no_grad():
        expected = float(model(**ids).logits.double().sum())
    name, total, height = done.stdout.split()[-3:]
    assert (name, height) == ("Qwen2ForCausalLM", "24")
    assert float(total) == expected


def test_a_revision_stays_when_main_moves_on(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "gone.json").write_text("old")
    first = hub.add_model("acme/x", folder)
    replacement = tmp_path / "new"
    replacement.mkdir()
    (replacement / "config.json").write_text("new")
    second = hub.add_model("acme/x", replacement)
    assert first != second

    def read(revision: str) -> str:
        return Path(hf_hub_download("acme/x", "config.json", revision=revision)).read_text()

    assert (read(first), read("main"), read(second)) == ("old", "new", "new")
    api = HfApi()
    assert api.model_info("acme/x").sha == second
    assert api.list_repo_files("acme/x") == ["config.json"]
    assert [one.commit_id for one in api.list_repo_commits("acme/x")] == [second, first]


def test_what_is_not_there_is_refused_as_the_hub_does(hub: HubServer, tmp_path: Path) -> None:
    hub.add_model("acme/x", tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("acme/none", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("acme/x", "config.json", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("acme/x", "config.json")
    hub.add_model("tester/private", tmp_path, private=True)
    assert HfApi().model_info("tester/private").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("tester/private")


def test_large_files_come_from_another_host_without_the_token(
    hub: HubServer, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    hub.add_model("tester/run", run, private=True)
    data = (run / "graft.safetensors").read_bytes()
    assert Path(hf_hub_download("tester/run", "graft.safetensors")).read_bytes() == data
    large = next(path for path in hub.paths("GET") if path.startswith("/large/"))
    with_token = get_session().get(
        hub.cdn_url + large, headers={"Authorization": f"Bearer {hub.token}"}
    )
    assert with_token.status_code == 400
    part = get_session().get(hub.cdn_url + large, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, data[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(data)}"
    past = get_session().get(hub.cdn_url + large, headers={"Range": f"bytes={len(data)}-"})
    assert past.status_code == 416


def test_lz4_matches_may_overlap_what_they_write() -> None:
    out = bytearray()
    # 3 literals "abc", then 3 + 4 + 4 = 11 bytes from 3 back; then one literal "!"
    _lz4_block(bytes([0x37]) + b"abc" + b"\x03\x00" + b"\x10!", out)
    assert bytes(out) == b"abcabcabcabcab!"


@pytest.mark.parametrize("size", [1, 4, 10, 11])
def test_grouped_bytes_come_back(size: int) -> None:
    data = bytes(range(size))
    assert _ungroup(b"".join(data[group::4] for group in range(4))) == data
