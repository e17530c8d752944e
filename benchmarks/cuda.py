"""A 7B base on a CUDA device: memory, speed and the largest batch, against transformers' Llava.

    python benchmarks/cuda.py [--weights bf16 --weights nf4] [--case 'IAA, 8 layers'] [--folder F]
                              [--checkpointing] [--peak-tflops 989] [--no-largest] [--json]

A Llama of 6.7 billion random parameters (32 layers, h 4096, vocab 32000) is written once, 13.5 GB,
and loaded in bf16 and in nf4 as `mmgraft train` loads it. Each case runs in a process of its
own: projector alone, IAA with 2, 8 and 14 layers, Wings with rank 64, and beside them transformers'
Llava with as many decoder layers, made of the same modules. A row is 576 image positions, given as
features, 64 of a question and 128 of an answer. Training is AdamW on fp32 parameters under bf16
autocast. FLOP utilisation needs the device's peak in bf16 without sparsity: known for some cards,
else `--peak-tflops`. Prints a Markdown table; a case that does not fit says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
WEIGHTS = ("bf16", "nf4")
SEVEN_BILLION: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SEVEN_BILLION, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 256,
}  # fmt: skip
PEAKS = {
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "A100": 312,
    "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10G": 70, "A10": 125,
    "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""Tera-operations a second in bf16, dense, by a part of the device's name: of its data sheet."""
_RESULT = "result: "
_HEAD = (
    "| base | case | weights | training peak | tokens/s | MFU | largest batch | decode, batch 1 | "
    "decode, batch 8 |\n|---|---|---:|---:|---:|---:|---:|---:|---:|"
)


def main() -> int:
    """Run every case and print the table; 2 where there is no CUDA device."""
    given = _options()
    if not given.tiny:
        import torch

        if not torch.cuda.is_available():
            sys.stderr.write(
                "cuda.py measures on a CUDA device, and torch finds none here. Run it where "
                "`mmgraft env` names one; the other benchmarks run on a CPU.\n"
            )
            return 2
    if given.only is not None:
        return _one(given)
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        base = folder / ("tiny" if given.tiny else "seven-billion")
        if not (base / "tokenizer.json").is_file():  # what is written last
            _write(base, given)
        results = [
            _in_process(weights, name, base)
            for weights in given.weights or WEIGHTS
            for name in _names(given)
        ]
    return _show(results, given)


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", action="append", choices=WEIGHTS, help="may be repeated")
    parser.add_argument("--case", action="append", help="name of a case; may be repeated")
    parser.add_argument("--folder", type=Path, help="keeps the base that is written")
    parser.add_argument("--batch", type=int, default=4, help="rows in a step")
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--new-tokens", type=int, default=128, help="that are generated")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--no-largest", action="store_true", help="do not seek the largest batch")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bf16")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--tiny", action="store_true", help=argparse.SUPPRESS
    )  # on a CPU, for tests
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)  # weights, case, base's folder
    given = parser.parse_args(arguments)
    for name in ("batch", "steps"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is at least 1")
    if given.new_tokens < 3:
        parser.error("--new-tokens is at least 3: two are taken for what comes before the first")
    return given


def _names(given: argparse.Namespace) -> list[str]:
    from cuda_cases import CASES

    known = [case.name for case in CASES]
    for name in given.case or []:
        if name not in known:
            sys.stderr.write(f"no case {name!r}; there are: {'; '.join(known)}\n")
            raise SystemExit(2)
    return given.case or known


def _write(base: Path, given: argparse.Namespace) -> None:
    """The base, random; what an earlier call left half-written is written anew."""
    import shutil

    import torch
    from folders import write_base

    shutil.rmtree(base, ignore_errors=True)
    write_base(base, TINY if given.tiny else SEVEN_BILLION, torch.bfloat16, shard_bytes=2 << 30)


def _in_process(weights: str, name: str, base: Path) -> dict[str, Any]:
    """One case, by this script in another process; its result, or why there is none."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", weights, name, str(base)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith(_RESULT)), None)
    case = {"base": weights, "case": name}
    if line is None:
        return {**case, "error": f"ended with exit code {done.returncode}"}
    return {**case, **json.loads(line.removeprefix(_RESULT))}


def _one(given: argparse.Namespace) -> int:
    import torch
    from cuda_cases import CASES, Sizes, build, measure

    from mmgraft.errors import is_out_of_memory

    weights, name, base = given.only
    case = next(case for case in CASES if case.name == name)
    sizes = Sizes(
        batch=given.batch,
        steps=given.steps,
        new_tokens=given.new_tokens,
        checkpointing=given.checkpointing,
    )
    rank = 64
    if given.tiny:
        small = {"image": 16, "before": 4, "answer": 8, "largest": 3, "decode_batches": (1, 2)}
        sizes, rank = replace(sizes, device="cpu", **small), 4
    torch.manual_seed(0)
    report: dict[str, Any]
    try:
        built = build(case, Path(base), "nf4" if weights == "nf4" else None, sizes, rank)
        report = measure(built, _peak_flops(given), not given.no_largest)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        report = {"error": "the weights do not fit"}
    sys.stdout.write(f"{_RESULT}{json.dumps(report)}\n")
    return 0


def _peak_flops(given: argparse.Namespace) -> float | None:
    if given.peak_tflops is not None:
        return given.peak_tflops * 1e12
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)


def _show(results: list[dict[str, Any]], given: argparse.Namespace) -> int:
    from pairs import machine, machine_line

    device = _device()
    if given.json:
        report = {"machine": machine(), "device": device, "results": results}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        lines = [f"{device}; {machine_line()}", "", _HEAD, *(_line(one) for one in results)]
        sys.stdout.write("\n".join(lines) + "\n")
    return 1 if any("error" in one for one in results) else 0


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device"
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"


def _line(one: dict[str, Any]) -> str:
    cells = [one["base"], one["case"]]
    if "error" in one:
        return f"| {' | '.join(cells)} | {one['error']} |" + " |" * 6
    trained, decoded = one["training"], one["decoding"]
    cells.append(_gigabytes(one["weights"]))
    if trained is None:
        cells += ["does not fit", "-", "-"]
    else:
        mfu = "-" if trained["mfu"] is None else f"{trained['mfu']:.1%}"
        cells += [_gigabytes(trained["peak"]), f"{trained['tokens_per_second']:.0f}", mfu]
    cells.append(str(one.get("largest_batch") or "-"))
    if decoded is None:
        cells += ["does not fit", "-"]
    else:
        cells += [f"{part['tokens_per_second']:.1f} tokens/s" for part in decoded.values()]
    return f"| {' | '.join(cells)} |"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())
