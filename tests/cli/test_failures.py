from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from mmgraft import IAAConfig
from mmgraft.cli.failures import explain
from mmgraft.errors import UsageError


def test_a_full_disk_is_a_failure_that_says_what_is_safe() -> None:
    known = explain(OSError(errno.ENOSPC, "No space left on device", "/runs/graft.safetensors"))
    assert known is not None
    message, code = known
    assert code == 1
    assert "disk is full (/runs/graft.safetensors)" in message
    assert "is whole" in message


def test_a_folder_without_rights() -> None:
    message, code = explain(PermissionError(errno.EACCES, "Permission denied", "/root/x")) or (
        "",
        0,
    )
    assert code == 1
    assert "choose another folder" in message


def test_any_other_os_error_keeps_its_words() -> None:
    message, code = explain(FileNotFoundError(2, "No such file", "x.json")) or ("", 0)
    assert code == 1
    assert "No such file" in message


class Unreachable(Exception):
    """As the HTTP library raises it, which is httpx or httpx2, as huggingface_hub has it."""

    __module__ = "httpx2"


@pytest.mark.parametrize(
    "error", [Unreachable("no route"), LocalEntryNotFoundError("not in the cache")]
)
def test_a_dead_network_is_a_failure(error: Exception) -> None:
    message, code = explain(error) or ("", 0)
    assert code == 1
    assert "network" in message
    assert str(error) in message


def test_an_unknown_repository_is_wrong_use() -> None:
    response = SimpleNamespace(headers={}, request=None)
    error = RepositoryNotFoundError("no me/x here", response=response)  # type: ignore[arg-type]
    message, code = explain(error) or ("", 0)
    assert code == 2
    assert message.startswith("no me/x here\n")
    assert "Check the name" in message


def test_a_config_that_pydantic_refuses_is_wrong_use() -> None:
    with pytest.raises(ValueError, match="gaet") as caught:
        IAAConfig(layers=[1], gaet="scalar")  # type: ignore[call-arg]
    message, code = explain(caught.value) or ("", 0)
    assert code == 2
    assert message.startswith("IAAConfig: unknown key 'gaet'")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
        type("AcceleratorError", (RuntimeError,), {})("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory_says_how_to_need_less(error: BaseException) -> None:
    message, code = explain(error) or ("", 0)
    assert code == 1
    assert "smaller batch" in message


def test_our_own_errors_and_defects() -> None:
    assert explain(UsageError("say")) == ("say", 2)
    assert explain(ZeroDivisionError()) is None
    assert explain(ValueError("any")) is None
