from __future__ import annotations

import json

import pytest

import mmgraft
import mmgraft.cli.env as env


def test_json_has_what_a_bug_report_needs(cli) -> None:
    data = json.loads(cli("env", "--json").out)
    assert data["packages"]["mmgraft"] == mmgraft.__version__
    assert data["packages"]["torch"]
    assert data["devices"][-1] == "cpu"
    assert data["threads"] >= 1
    assert data["hub"]["offline"] is True
    assert set(data["demo"]) == set(env.DEMO_PACKAGES)


def test_a_token_is_never_shown(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    for ran in (cli("env"), cli("env", "--json")):
        assert ran.code == 0
        assert "secret" not in ran.out + ran.err


def test_what_is_missing_comes_with_the_line_that_installs_it(
    cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = env.installed_version
    missing = {"bitsandbytes", "easy-vqa"}
    monkeypatch.setattr(
        env, "installed_version", lambda name: None if name in missing else real(name)
    )
    out = cli("env").out
    assert "pip install 'mmgraft[4bit]'" in out
    assert "pip install --no-deps easy-vqa" in out
    data = json.loads(cli("env", "--json").out)
    assert data["packages"]["bitsandbytes"] is None
    assert data["4bit"].startswith("no")
