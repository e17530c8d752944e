from __future__ import annotations

import json

import pytest

import mmgraft.grafts.registry as registry


def test_the_table_names_methods_and_papers(cli) -> None:
    ran = cli("methods")
    assert ran.code == 0
    papers = {"iaa": "2408.12902", "wings": "2406.03496", "llava": "2304.08485"}
    for words in {**papers, "lora": "2503.01743", "expert": "2311.03079"}.items():
        assert any(all(word in line for word in words) for line in ran.out.splitlines())
    (lora,) = (line for line in ran.out.splitlines() if line.startswith("lora"))
    assert "E0 E1 E2 (gate token) E3" in lora
    assert "E2 before an image in its row" in ran.err


def test_projectors_are_listed_with_what_they_compute(cli) -> None:
    lines = cli("methods").out.splitlines()
    for words in (["pool", "mean of k x k"], ["pixel_shuffle", "side by side"], ["linear", "one"]):
        assert any(all(word in line for word in words) for line in lines)


def test_json_tells_the_settings(cli) -> None:
    data = json.loads(cli("methods", "--json").out)
    (iaa,) = (method for method in data["methods"] if method["name"] == "iaa")
    assert iaa["settings"]["structure"]["enum"] == ["a", "b", "c"]
    assert iaa["settings"]["layers"]["description"]
    assert iaa["levels"] == {"E0": [], "E1": [], "E3": ["structure: a", "structure: b"]}
    assert data["broken"] == []


def test_a_broken_method_is_told_and_the_others_shown(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = registry.Broken("bridge", "mmgraft-bridges", "ImportError: no")
    monkeypatch.setattr(registry, "broken_methods", lambda: [broken])
    ran = cli("methods")
    assert ran.code == 0
    assert "wings" in ran.out
    assert "'bridge' of the package 'mmgraft-bridges' cannot be used: ImportError: no" in ran.err
    assert json.loads(cli("methods", "--json").out)["broken"][0]["name"] == "bridge"
