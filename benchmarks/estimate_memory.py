"""Compare `mmgraft estimate` with the memory that small trainings take.

    python benchmarks/estimate_memory.py [--only NAME] [--json]

Each configuration trains a random Llama of 16 or 67 million parameters for eight steps, in a
process of its own that is forked after all imports. Measured is its peak resident memory above what
it had after them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "support")]

SMALL = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 16384,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
LARGE = {**SMALL, "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12,
         "num_attention_heads": 10, "num_key_value_heads": 5}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A training to measure."""

    name: str
    method: str
    train: list[str]
    base: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    words: int = 100


_GRAFT = ["projector", "graft"]
_IAA = {"layers": [2, 4], "embedding": False, "head": False}
_CHECKPOINTED = {"gradient_checkpointing": True}

CASES = (
    Case("llava", "llava", ["projector"], SMALL),
    Case("iaa", "iaa", _GRAFT, LARGE, _IAA),
    Case("iaa, checkpointing", "iaa", _GRAFT, LARGE, _IAA, _CHECKPOINTED),
    Case("iaa, own embedding, head", "iaa", _GRAFT, LARGE, {"embedding": True, "head": True}),
    Case("wings", "wings", _GRAFT, SMALL, {"rank": 16}),
    Case("wings, checkpointing", "wings", _GRAFT, SMALL, {"rank": 16}, _CHECKPOINTED),
    Case("wings, accumulated", "wings", _GRAFT, SMALL, {"rank": 64}, {"accumulate": 2}),
    Case("llava, base trained", "llava", ["projector", "base"], SMALL, recipe={"base": "full"}),
    Case("iaa, nf4", "iaa", _GRAFT, LARGE, _IAA, recipe={"quantization": "nf4"}),
    Case("llava, fp32", "llava", ["projector"], SMALL, recipe={"precision": "fp32"}),
)


def main() -> int:
    """Measure every case and print predicted, measured and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="name of a case; may be repeated")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    _import_everything()
    results = []
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = _in_process(_make, case, Path(folder), options)
            if "error" in made:
                results.append({"case": case.name, **made})
                continue
            predicted = _in_process(_predict, case, Path(folder), options)
            measured = _in_process(_train, case, Path(folder), options)
        results.append({"case": case.name, **predicted, **measured})
        if not options.json:
            _print(results[-1])
    if options.json:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
    return 0


def _print(result: dict[str, Any]) -> None:
    if "error" in result:
        sys.stdout.write(f"{result['case']:30s} failed: {result['error']}\n")
        return
    predicted, measured = result["predicted"], result["measured"]
    sys.stdout.write(
        f"{result['case']:30s} predicted {predicted / 1e6:7.0f} MB   measured "
        f"{measured / 1e6:7.0f} MB   ratio {predicted / measured:.2f}   {result['moment']}\n"
    )
    sys.stdout.flush()


def _import_everything() -> None:
    import accelerate  # noqa: F401
    import torch
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama  # noqa: F401
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: F401

    import mmgraft.training.memory.request
    import mmgraft.training.run
    import mmgraft.training.session  # noqa: F401
    import tiny_runs  # noqa: F401

    torch.set_num_threads(1)


def _in_process(work: Any, *args: Any) -> dict[str, Any]:
    """Run in a forked process, whose memory is its own; gives what it returned."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work(*args)
        except BaseException as error:  # whatever it is, the table says it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        os.write(send, json.dumps(answer).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process was ended"}


def _make(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tiny import save_base
    from tiny_runs import make_rows, make_run, write_recipe
    from tiny_towers import save_tower

    save_base(folder / "base", "llama", dtype=torch.bfloat16, **case.base)
    save_tower(folder / "tower", "clip", image_size=96, hidden_size=64, num_attention_heads=4)
    _lengthen(make_rows(folder, count=4 * options.batch), case.words)
    run = make_run(folder, folder / "run", case.method, **case.config)
    stage = {
        "name": "only", "train": case.train, "lr": 1e-4, "max_steps": options.steps,
        "batch_size": options.batch, **case.stage,
    }  # fmt: skip
    write_recipe(
        run,
        folder,
        case.method,
        [stage],
        **{"precision": "bf16", **case.recipe, "save_every": None},
    )
    return {}


def _lengthen(rows: Path, words: int) -> None:
    """Answers of about so many words, each row's one word longer than the last one's."""
    lines = []
    for number, line in enumerate(rows.read_text().splitlines()):
        row = json.loads(line)
        row["messages"][-1]["content"] = "blue square " * ((words + number) // 2)
        lines.append(json.dumps(row))
    rows.write_text("\n".join(lines) + "\n")


def _predict(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from mmgraft.training.memory.request import read_request

    (stage,) = read_request(folder / "run", device="cpu").stages()
    return {
        "predicted": stage.peak,
        "moment": stage.moment,
        "length": stage.rows.length,
        "weights": stage.weights,
        "optimizer": stage.optimizer,
        "gradients": stage.gradients,
        "working": stage.working,
    }


def _train(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from mmgraft.training.run import plan_training, train

    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    marks: list[tuple[str, int]] = []

    def announce(text: str) -> None:
        marks.append((text[:24], (_status("VmHWM") - before) // 1_000_000))

    train(plan_training(folder / "run", device="cpu"), announce)
    return {"measured": _status("VmHWM") - before, "marks": marks}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} in /proc/self/status: this needs Linux")


if __name__ == "__main__":
    sys.exit(main())
