from __future__ import annotations

import subprocess
import sys

import pytest

import mmgraft


def test_importing_mmgraft_and_its_configs_imports_no_torch() -> None:
    code = (
        "import sys, mmgraft\n"
        "mmgraft.IAAConfig(layers='last:2'); mmgraft.WingsConfig(); mmgraft.LlavaConfig()\n"
        "mmgraft.LoraConfig(rank=8)\n"
        "mmgraft.UsageError\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "import mmgraft.grafts.registry\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    for name in mmgraft.__all__:
        assert getattr(mmgraft, name) is not None
    assert set(dir(mmgraft)) == set(mmgraft.__all__)


def test_load_is_from_pretrained() -> None:
    assert mmgraft.load == mmgraft.GraftedModel.from_pretrained


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="GraftedModle"):
        mmgraft.GraftedModle  # noqa: B018
