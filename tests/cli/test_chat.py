"""`mmgraft chat` and `mmgraft generate` by hand and by file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tiny import save_base, tiny_clip_dir
from tiny_runs import make_run
from tiny_towers import picture


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_base(folder / "base", "llama")
    tiny_clip_dir(folder / "tower")
    picture().save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return make_run(folder, folder / "run", "iaa", layers=[1, 3])


def test_one_question_gives_the_same_with_and_without_json(cli, run: Path) -> None:
    image = run.parent / "a.png"
    asked = ["chat", run, "what is it", "--image", image, "--max-new-tokens", "5"]
    ran = cli(*asked)
    assert ran.code == 0, ran.err
    assert json.loads(cli(*asked, "--json").out)["answer"] == ran.out.strip()


def test_a_lone_prompt_takes_the_graft_here(cli, run: Path, monkeypatch) -> None:
    monkeypatch.chdir(run)
    ran = cli("chat", "hello there", "--max-new-tokens", "3")
    assert ran.code == 0, ran.err
    assert "taking the graft" in ran.err


def test_a_dialogue_takes_pictures_and_survives_mistakes(cli, run: Path, monkeypatch) -> None:
    folder = run.parent
    lines = ["hello", "/image nowhere.png", f"/image {folder / 'broken.png'}",
             f"/image {folder / 'a.png'}", "what is it", "/what", "/clear", "hello", "/quit",
             "never said"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    ran = cli("chat", run, "--max-new-tokens", "4")
    assert ran.code == 0, ran.err
    assert "nowhere.png" in ran.err
    assert "broken.png" in ran.err
    assert "no command /what" in ran.err
    answers = [line for line in ran.out.split("\n") if line.strip()]
    assert answers[0] == answers[-1], "after /clear the same question has the same answer"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--workflow", "grounding"], "mm"),
        (["--dtype", "int8"], "bfloat16"),
        (["--verify", "hard"], "fast"),
        (["--device", "tpu"], "cpu"),
    ],
)
def test_mistakes(cli, run: Path, arguments: list[str], says: str) -> None:
    ran = cli("chat", run, "hello", *arguments)
    assert ran.code == 2
    assert says in ran.err


def test_cuda_is_refused_where_there_is_none(cli, run: Path) -> None:
    import torch

    if torch.cuda.is_available():
        return
    ran = cli("chat", run, "hello", "--device", "cuda")
    assert ran.code == 2
    assert "--device cpu" in ran.err


def _rows(run: Path) -> Path:
    image = {"type": "image", "image": "a.png"}

    def user(*content: object) -> dict[str, object]:
        parts = [c if isinstance(c, dict) else {"type": "text", "text": c} for c in content]
        return {"role": "user", "content": parts}

    answer = {"role": "assistant", "content": "known"}
    rows = [
        {"id": "x", "messages": [user(image, "what")]},
        {"id": "y", "messages": [user("text alone, and rather longer")]},
        {"id": "z", "messages": [user("and", image), answer]},
    ]
    path = run.parent / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_generate_keeps_the_order_whatever_the_batch(cli, run: Path, tmp_path: Path) -> None:
    rows = _rows(run)
    texts = []
    for size in (1, 2):
        out = tmp_path / f"{size}.jsonl"
        ran = cli("generate", run, rows, "--out", out, "--batch-size", size, "--max-new-tokens", 5)
        assert ran.code == 0, ran.err
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["id"] for line in lines] == ["x", "y", "z"]
        texts.append([line["answer"] for line in lines])
    assert texts[0] == texts[1]


def test_generate_writes_nothing_for_bad_rows(cli, run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": "q.png"}]}]}'
    )
    ran = cli("generate", run, rows, "--out", tmp_path / "out.jsonl")
    assert ran.code == 2
    assert "q.png" in ran.err
    assert not (tmp_path / "out.jsonl").exists()


def test_generate_keeps_an_output_that_is_there(cli, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    ran = cli("generate", run, _rows(run), "--out", out)
    assert ran.code == 2
    assert out.read_text() == "mine"
