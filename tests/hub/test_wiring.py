"""A push sends what was planned, where it was planned, on what was there then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from mmgraft.hub.push import PushPlan, Target, send
from mmgraft.runs.contents import UploadFile


class Api:
    """Keeps what it is asked for."""

    endpoint = "https://hub"

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.sent: list[Any] = []

    def create_repo(self, *args: Any, **more: Any) -> None:
        self.made.append((args, more))

    def create_commit(self, *args: Any, **more: Any) -> None:
        self.sent.append((args, more))


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("revision", [None, "c" * 40])
def test_a_push_is_one_commit(tmp_path: Path, private: bool, revision: str | None) -> None:
    (tmp_path / "README.md").write_text("mine")
    record: Any = SimpleNamespace(method="iaa", dump=lambda: "{}", model_copy=lambda **_: record)
    plan = PushPlan(tmp_path, record, [UploadFile("a.txt", b"a")], own_readme=True)
    api: Any = Api()
    target = Target(api, "me/mine", revision, private, ["old.txt"], record, [])
    assert send(plan, target, private) == "https://hub/me/mine"
    new = [(("me/mine",), {"private": private, "exist_ok": True})]
    assert api.made == (new if revision is None else [])
    (((repo, operations), more),) = api.sent
    assert repo == "me/mine"
    assert more.pop("commit_message").startswith("Push a iaa graft")
    assert more == {"parent_commit": revision}
    names = {type(one): [] for one in operations}
    for one in operations:
        names[type(one)].append(one.path_in_repo)
    assert names[CommitOperationDelete] == ["old.txt"]
    assert sorted(names[CommitOperationAdd]) == ["README.md", "a.txt", "graft_config.json"]
