"""Three questions that only a card can answer, measured: python benchmarks/cuda_switches.py

1. cuDNN's attention, which torch prefers on Hopper, builds a graph for every new shape. Is a
   generation, whose keys grow by one a token, or a training of uneven rows faster without it?
2. The router of Wings reads its logits from two more columns beside each value, so that a head of
   128 is 136 wide and leaves the kernels of 128. Is one wide call faster than two narrow ones?
3. transformers compiles a base's decoding with a static cache, and not a graft's, whose slots grow.
   What does a token take in each cache, by the base alone and by the graft?

Prints a Markdown table a question; a ratio above 1 says that the second way is the faster one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))


@dataclass(frozen=True)
class Shape:
    """Heads, their width, rows of a batch, positions of a row, tokens to decode."""

    heads: int = 32
    width: int = 128
    rows: int = 4
    length: int = 704
    tokens: int = 128


TINY = Shape(heads=2, width=16, rows=2, length=12, tokens=4)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, help="folder of a base; default: a small random one")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU: does it run?")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        sys.stderr.write("needs a CUDA device; `mmgraft env` says what torch finds\n")
        return 2
    device, shape = ("cpu", TINY) if given.tiny else ("cuda", Shape())
    sys.stdout.write(
        "| attention over new shapes | with cuDNN | without | ratio |\n|---|---|---|---|\n"
    )
    for name, seconds in cudnn(device, shape).items():
        sys.stdout.write(_row(name, *seconds))
    sys.stdout.write(
        "\n| router's logits | one wide call | two calls | ratio |\n|---|---|---|---|\n"
    )
    for name, seconds in router_calls(device, shape).items():
        sys.stdout.write(_row(name, *seconds))
    sys.stdout.write("\n| a decoded token | dynamic | static | ratio |\n|---|---|---|---|\n")
    for name, seconds in caches(device, shape, given.base).items():
        sys.stdout.write(_row(name, *seconds))
    return 0


def cudnn(device: str, shape: Shape) -> dict[str, tuple[float, float]]:
    """Time attention whose shape is new in every call, with cuDNN's kernel and without it."""

    def decode() -> None:
        query = _random(device, shape, 1)
        for more in range(shape.tokens):
            keys = _random(device, shape, shape.length + more)
            F.scaled_dot_product_attention(query, keys, keys)

    def train() -> None:
        for more in range(shape.tokens):
            length = shape.length + more
            x = _random(device, shape, length).requires_grad_()
            mask = torch.ones(shape.rows, 1, length, length, dtype=torch.bool, device=device).tril()
            F.scaled_dot_product_attention(x, x, x, attn_mask=mask).sum().backward()

    found = {}
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for name, work in (("decoding", decode), ("training", train)):
            pair = []
            for enabled in (True, False):
                torch.backends.cuda.enable_cudnn_sdp(enabled)
                pair.append(_seconds(device, work, warm=False))
            found[name] = (pair[0], pair[1])
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return found


def router_calls(device: str, shape: Shape) -> dict[str, tuple[float, float]]:
    """Time a forward and backward pass of an attention with two more columns of values."""
    wide = -(-(shape.width + 2) // 8) * 8
    causal = torch.ones(shape.length, shape.length, dtype=torch.bool, device=device).tril()
    found = {}
    for name, mask in (("causal", None), ("with a mask", causal)):
        x = _random(device, shape, shape.length).requires_grad_()
        columns = torch.randn_like(x[..., :2])

        def attend(value: Tensor, query: Tensor, mask: Tensor | None = mask) -> Tensor:
            options: dict[str, Any] = {"is_causal": True} if mask is None else {"attn_mask": mask}
            scale = shape.width**-0.5
            return F.scaled_dot_product_attention(query, query, value, scale=scale, **options)

        def one(x: Tensor = x, columns: Tensor = columns, attend: Any = attend) -> None:
            value = F.pad(torch.cat([x, columns], dim=-1), (0, wide - shape.width - 2))
            attend(value, F.pad(x, (0, wide - shape.width))).sum().backward()

        def two(x: Tensor = x, columns: Tensor = columns, attend: Any = attend) -> None:
            routed = attend(F.pad(columns, (0, shape.width - 2)), x)
            (attend(x, x).sum() + routed[..., :2].sum()).backward()

        found[name] = (_seconds(device, one), _seconds(device, two))
    return found


def caches(device: str, shape: Shape, base: Path | None) -> dict[str, tuple[float, float]]:
    """Time a token of the base alone and of its grafts, in a dynamic and in a static cache."""
    from cuda import SEVEN_BILLION, TINY
    from cuda_cases import CASES, Sizes, build, rows
    from folders import write_base

    found = {}
    sizes = Sizes(device=device)
    if shape.length < 100:
        sizes = Sizes(image=4, before=4, answer=4, batch=1, device=device)
    with tempfile.TemporaryDirectory() as folder:
        if base is None:
            small = {**SEVEN_BILLION, "num_hidden_layers": 8} if device == "cuda" else TINY
            base = write_base(Path(folder) / "base", small, torch.bfloat16)
        for case in (one for one in CASES if not one.stock):
            built = build(case, base, None, sizes, 4 if device == "cpu" else 64)
            model, batch = built.model.eval(), rows(built, 1, prompt=True)
            if not found:
                text = {name: batch[name] for name in ("input_ids", "attention_mask")}
                found["the base alone"] = _tokens(device, model.base, text, shape.tokens)
            found[case.name] = _tokens(device, model, batch, shape.tokens)
    return found


def _tokens(device: str, model: Any, batch: dict[str, Any], tokens: int) -> tuple[float, float]:
    pair = []
    for cache in (None, "static"):
        options = {"cache_implementation": cache, "do_sample": False, "pad_token_id": 0}

        def generate(count: int, options: dict[str, Any] = options) -> Callable[[], Any]:
            length = {"max_new_tokens": count, "min_new_tokens": count}
            return lambda: model.generate(**batch, **options, **length)

        whole, start = (_seconds(device, generate(count)) for count in (tokens, 1))
        pair.append(max(whole - start, 1e-9) / max(tokens - 1, 1))
    return pair[0], pair[1]


def _random(device: str, shape: Shape, length: int) -> Tensor:
    size = (shape.rows, shape.heads, length, shape.width)
    return torch.randn(size, device=device, dtype=torch.bfloat16)


def _seconds(device: str, work: Callable[[], Any], warm: bool = True, times: int = 3) -> float:
    """Take the median time of some work; without warming, the first time alone."""
    if warm:
        work()
    took = []
    for _ in range(times if warm else 1):
        start = _now(device)
        work()
        took.append(_now(device) - start)
    return statistics.median(took)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _row(name: str, first: float, second: float) -> str:
    return f"| {name} | {first * 1e3:.2f} ms | {second * 1e3:.2f} ms | {first / second:.2f} |\n"


if __name__ == "__main__":
    raise SystemExit(main())
