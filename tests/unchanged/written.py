"""The files that `graft`, `train`, `export` and `push` write: their names, and what is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_fixtures import talk_to
from hub_server import HubServer
from unchanged.conditions import one_thread
from unchanged.listing import Lister
from unchanged.parts import METHODS, command, make_graft, write_recipe
from unchanged.stopped import go_on, train_until_it_stops

Files = dict[str, Any]
"""By command, and by the name of the file."""

_STAGE = {"name": "align", "train": ["projector"], "lr": 1e-3, "max_steps": 2, "batch_size": 2}
_TO_LLAVA = ("iaa", "llava")
_HUB = {"base": "tester/base", "tower": "tester/tower"}


def record(parts: Path, folder: Path, case: str) -> Files:
    """Return what a case's commands write in `folder`, by command."""
    here = folder / case
    here.mkdir(parents=True)
    lister = Lister({"parts": parts, "here": here})
    for source in sorted(path for path in parts.iterdir() if path.is_dir()):
        lister.list(source.name, source)
    with one_thread():
        return CASES[case](parts, here, lister)


def _whole_way(method: str) -> Callable[[Path, Path, Lister], Files]:
    """Make, train, export and push a graft of a method."""

    def follow(parts: Path, here: Path, lister: Lister) -> Files:
        plain = ["--no-projector-norm"] * (method in _TO_LLAVA)  # stock LLaVA has no such norm
        run = make_graft(parts, here / f"my-{method}", method, *plain)
        found = {"graft": lister.list("graft", run)}
        write_recipe(run, parts, method, [_STAGE])
        command("train", run, "--device", "cpu")
        found["train"] = lister.list("train", run)
        for kind in ("graft", "full", *["llava"] * (method in _TO_LLAVA)):
            command("export", run, "--to", kind, "--out", here / kind)
            found[f"export {kind}"] = lister.list(f"export {kind}", here / kind)
        found["push"] = _pushed(run, parts, here, METHODS[method][0], lister)
        return found

    return follow


def _pushed(run: Path, parts: Path, here: Path, base: str, lister: Lister) -> Files:
    """Return what a repository holds after a push."""
    options = ["--base-id", _HUB["base"], "--vision-id", _HUB["tower"], "--license", "mit"]
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        talk_to(hub, here / "home", patch)
        hub.add_model(_HUB["base"], parts / base)
        hub.add_model(_HUB["tower"], parts / "tower")
        command("push", run, "--repo-id", "tester/mine", "--yes", *options)
        repo = hub.repos["tester/mine"]
        for name in repo.names:
            file = here / "pushed" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(repo.read(name))
    return lister.list("push", here / "pushed")


def _structure_b(parts: Path, here: Path, lister: Lister) -> Files:
    """IAA of structure b, with the gates that c has not, and without tables of its own."""
    own = ("--structure", "b", "--gate", "scalar", "--no-embedding", "--no-head")
    return {"graft": lister.list("graft", make_graft(parts, here / "b", "iaa", *own))}


def _trained_base(parts: Path, here: Path, lister: Lister) -> Files:
    """A graft whose base is trained, and so goes along."""
    run = make_graft(parts, here / "whole", "llava")
    stage = {**_STAGE, "train": ["projector", "base"], "text_rows": "base"}
    write_recipe(run, parts, "llava", [stage], base="full")
    command("train", run, "--device", "cpu")
    found = {"train": lister.list("train", run)}
    command("export", run, "--to", "graft", "--out", here / "graft")
    return {**found, "export graft": lister.list("export graft", here / "graft")}


def _stopped(parts: Path, here: Path, lister: Lister) -> Files:
    """A training that stops in its second stage, and goes on."""
    run = make_graft(parts, here / "stopped", "wings")
    train_until_it_stops(run, parts, "wings")
    found = {"train until it stops": lister.list("stopped", run)}
    go_on(run)
    return {**found, "train --resume": lister.list("resumed", run)}


CASES: dict[str, Callable[[Path, Path, Lister], Files]] = {
    **{method: _whole_way(method) for method in METHODS},
    "iaa-structure-b": _structure_b,
    "trained-base": _trained_base,
    "stopped": _stopped,
}
