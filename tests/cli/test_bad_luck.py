"""Meet failures that no one is to blame for: exit code 1, and what was there before is whole.

A full disk is played by the largest size that a file may have, and by an error of its number. The
network that goes away in the middle of a push is in test_hub_verbatim.py, kills at every step of a
save in tests/model/test_saving.py.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub_fixtures import contents
from refusals import GRAFT
from waiting import LAST, wait_until

pytestmark = pytest.mark.xdist_group("bad-input")

LIMITED = """
import os, resource, signal, sys
sys.dont_write_bytecode = True  # it would be cut short, too
import torch, transformers
from mmgraft.cli.app import run
import mmgraft.export.graft, mmgraft.export.llava.export, mmgraft.training.session
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
base, tower, rows, images = sys.argv[1:]
graft = ["graft", base, "--method", "iaa", "--layers", "1,2", "--vision", tower]
for command in (
    [*graft, "--out", "run", "--force"],
    [*graft, "--out", "fresh"],
    ["export", "run", "--to", "graft", "--out", "out"],
    ["export", "run", "--to", "full", "--out", "out"],
    ["export", "plain", "--to", "llava", "--out", "out"],
    ["generate", "run", rows, "--images", images, "--out", "answers.jsonl"],
):
    print("code", run(command), command[:4], file=sys.stderr)
"""


def test_a_disk_that_takes_no_more(run: Path, parts: Path, here: Path, cli: Any) -> None:
    pytest.importorskip("resource")
    options = ["--vision", parts / "tower", "--out", "plain"]
    assert cli("graft", parts / "base", *GRAFT, *options).code == 0
    rows = here / "rows.jsonl"
    line = '{"id": "%s", "messages": [{"role": "user", "content": "hi"}]}\n'
    rows.write_text("".join(line % ("x" * 900) for _ in range(10)))  # answers of 9 kB
    before = contents(here)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, (parts / "base", parts / "tower", rows, here))],
        capture_output=True, text=True, cwd=here, timeout=LAST,
    )  # fmt: skip
    codes = [line for line in done.stderr.splitlines() if line.startswith("code ")]
    assert len(codes) == 6, done.stderr
    assert all(line.startswith("code 1 ") for line in codes), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("again") >= 6, done.stderr
    assert contents(here) == before
    assert {path.name for path in here.iterdir()} == {"run", "plain", "rows.jsonl"}


def test_a_full_disk_is_called_so(cli: Any, run: Path, parts: Path, monkeypatch: Any) -> None:
    before = contents(run)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ran = cli("graft", parts / "base", *GRAFT, "--vision", parts / "tower", "--out", "run",
              "--force")  # fmt: skip
    assert ran.code == 1
    assert "No space left on device" in ran.err
    assert "is as it was" in ran.err
    assert contents(run) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs rights of Unix")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(cli: Any, run: Path, parts: Path) -> None:
    run.chmod(0o555)
    try:
        ran = cli("graft", parts / "base", *GRAFT, "--vision", parts / "tower", "--out", run,
                  "--force")  # fmt: skip
    finally:
        run.chmod(0o755)
    assert ran.code == 1
    assert "Traceback" not in ran.err


def test_a_killed_training_goes_on(run: Path, here: Path, cli: Any) -> None:
    """SIGKILL while checkpoints are written all the time; the graft is the old one, whole."""
    graft = (run / "graft.safetensors").read_bytes()
    command = [sys.executable, "-m", "mmgraft", "train", "run", "--max-steps", "100000"]
    command += ["--set", "save_every=1", "--set", "log_every=1"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=here)
    saved = run / "checkpoints" / "1-align"
    try:
        for _ in range(2):  # it writes further ones while it is killed
            before = set(saved.glob("checkpoint-*"))
            wait_until(
                lambda before=before: (
                    child.poll() is not None or set(saved.glob("checkpoint-*")) - before
                ),
                "a checkpoint",
            )
            assert child.poll() is None, child.communicate()[1]
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert (run / "graft.safetensors").read_bytes() == graft
    steps = max(int(path.name.rpartition("-")[2]) for path in saved.glob("checkpoint-*"))
    assert cli("chat", run, "hello", "--max-new-tokens", "1").code == 0
    ran = cli("train", run)
    assert ran.code == 2
    assert "--resume" in ran.err
    # The run was to go on for long: two steps more are enough to see that it does.
    used = run / "recipe.used.yaml"
    used.write_text(used.read_text().replace("100000", str(steps + 2)))
    ran = cli("train", run, "--resume", "--json")
    assert ran.code == 0, ran.err
    assert (run / "graft.safetensors").read_bytes() != graft
    assert '"steps": 2' in ran.out
    assert not [path for path in run.rglob("*") if path.name.startswith(".")]


def test_an_export_that_is_killed_leaves_the_old_one(cli: Any, run: Path, here: Path) -> None:
    assert cli("export", run, "--to", "full", "--out", "out").code == 0
    before = contents(here / "out")
    shutil.copytree(here / "out", here / "kept")
    script = """
import os, signal, sys
import mmgraft.export.folder as full
from mmgraft.cli.app import run
original = full.atomic_folder
def killed(path, writer):
    def half(folder):
        writer(folder)
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, half)
full.atomic_folder = killed
run(["export", "run", "--to", "full", "--out", "out", "--force"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(here / "out") == before
