"""The CUDA benchmark where there is no CUDA: it refuses, and its cases compute at tiny size."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cuda
import cuda_cases
from folders import write_base

TINY = cuda_cases.Sizes(
    image=6, before=3, answer=4, batch=2, steps=1, new_tokens=4, decode_batches=(1, 2),
    largest=3, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("cuda") / "base", cuda.TINY, torch.bfloat16)


def case(name: str) -> cuda_cases.Case:
    return next(one for one in cuda_cases.CASES if one.name == name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda.py"])
    assert cuda.main() == 2
    assert "`mmgraft env`" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--new-tokens", "2"], ["--weights", "x"]])
def test_odd_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cuda._options(arguments)
    assert stop.value.code == 2


def test_an_unknown_case_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cuda._names(cuda._options(["--case", "IAA, 3 layers"]))
    assert "'IAA, 3 layers'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["IAA, 2 layers", "LLaVA, projector"])
def test_the_llava_beside_it_computes_the_same(base: Path, name: str) -> None:
    mine = case(name)
    outputs, trained = [], []
    for one in (mine, replace(mine, stock=True)):
        built = cuda_cases.build(one, base, None, TINY)
        with torch.no_grad():
            batch = {k: v for k, v in cuda_cases.rows(built, 2).items() if k != "labels"}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs.append(built.model(**batch).logits)
        trained.append(sum(p.numel() for p in built.trained))
        assert len(list(_layers(built))) == built.layers
    assert trained[0] == trained[1] > 0
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def _layers(built: cuda_cases.Built) -> list[torch.nn.Module]:
    if built.stock:
        return list(built.model.model.language_model.layers)
    return [*built.model.base.model.layers, *getattr(built.model.workflow().graft, "layers", [])]


@pytest.mark.parametrize("name", [one.name for one in cuda_cases.CASES if one.inserted < 8])
def test_every_case_is_measured(base: Path, name: str) -> None:
    built = cuda_cases.build(case(name), base, None, TINY, rank=4)
    before = [p.detach().clone() for p in built.trained]
    report = cuda_cases.measure(built, 1e12, largest=True)
    assert report["largest_batch"] == TINY.largest  # a CPU runs into no limit of a card
    assert report["training"]["tokens_per_second"] > 0
    assert report["training"]["mfu"] == pytest.approx(report["training"]["tflops"])
    assert set(report["decoding"]) == {"1", "2"}
    moved = [not torch.equal(a, b.to(a.dtype)) for a, b in zip(before, built.trained, strict=True)]
    assert any(moved)  # the step trains


@pytest.mark.parametrize("limit", range(1, 12))
def test_the_largest_batch_is_found(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    tried: list[int] = []

    def holds(built: object, count: int) -> bool:
        tried.append(count)
        return count <= limit

    monkeypatch.setattr(cuda_cases, "_holds", holds)
    built = type("", (), {"sizes": replace(TINY, largest=8)})()
    assert cuda_cases.largest_batch(built) == min(limit, 8)
    assert len(tried) == len(set(tried))
    assert max(tried) <= 8


def test_operations_are_counted_as_said() -> None:
    built = cuda_cases.Built(
        model=None, stock=False, token=0, trained=[torch.nn.Parameter(torch.zeros(5))],
        sizes=TINY, width=8, layer_parameters=100, layers=3, vocab=10, graft_parameters=7,
    )  # fmt: skip
    positions = 2 * (6 + 3 + 4)
    frozen = 3 * 100 * 4 + 7 * 4
    attention = 6 * 13 * 8 * 3
    assert cuda_cases.flops(built, 2) == positions * (frozen + 2 * 5 + attention) + 2 * 4 * 4 * 80


def test_inserted_layers_stand_where_published() -> None:
    assert cuda_cases.places(14, 32) == [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31]
    assert cuda_cases.places(2, 4) == [1, 3]
    assert len(cuda_cases.places(8, 32)) == 8


@pytest.mark.parametrize(
    "result",
    [
        {"error": "the weights do not fit"},
        {"weights": 1, "training": None, "decoding": None},
        {
            "weights": 1,
            "training": {"peak": 2, "tokens_per_second": 3.0, "mfu": 0.5},
            "largest_batch": 4,
            "decoding": {"1": {"tokens_per_second": 5.0}, "8": {"tokens_per_second": 6.0}},
        },
    ],
)
def test_every_row_has_the_columns_of_the_head(result: dict[str, object]) -> None:
    line = cuda._line({"base": "nf4", "case": "x", **result})
    assert line.count("|") == cuda._HEAD.splitlines()[0].count("|")
