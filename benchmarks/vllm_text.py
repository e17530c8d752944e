"""Text through a folder of `mmgraft export --to vllm` against the base served alone, in vLLM.

    .venv-engines/bin/python benchmarks/vllm_text.py [--base FOLDER] [--pairs 10] [--json]

Both engines live in this process; each is asked the same eight prompts, in pairs. The graft is IAA
with three inserted layers, and its own embedding, norm and head. Without `--base` the base is a
random Llama of 4 layers. `--memory` prints what weights take instead, of base and two workflows of
IAA-8 against three models: as vLLM reports them for a tiny one, and from shapes for Llama-3-8B.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from pairs import Row, alternate, clock, options, show

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "support")]

TEXT = "One morning the old gardener found a door behind the ivy, and so he"
GOAL = 0.95
MEMORY_GOAL = 0.62

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 2048, "head_dim": 32,
}  # fmt: skip
"""The proportions of Llama-3-8B, nearly."""


def weights(shape: dict[str, int], workflows: int, inserted: int = 8) -> int:
    """Numbers in a base with this many workflows beside it, or in the base alone (0).

    A workflow of IAA has layers, an embedding, a final norm and a head of its own. Projectors and
    the tower are left out.
    """
    size, inner = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim", size // shape["num_attention_heads"])
    keys = shape["num_key_value_heads"] * head
    queries = shape["num_attention_heads"] * head
    layer = 2 * size * queries + 2 * size * keys + 3 * size * inner + 2 * size
    ends = 2 * shape["vocab_size"] * size + size
    return shape["num_hidden_layers"] * layer + ends + workflows * (inserted * layer + ends)


def share(shape: dict[str, int]) -> float:
    """Base and two workflows of eight layers over three models of the base's size."""
    return weights(shape, 2) / (3 * weights(shape, 0))


def speed(given: Any) -> Row:
    """Tokens a second of text, in pairs."""
    import torch
    from vllm import SamplingParams

    from mmgraft.export.vllm import export_vllm
    from tiny_exports import make_base, make_graft
    from vllm_engine import SIZES, engine

    torch.set_num_threads(given.threads)
    asked = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    prompts = [f"{number}. {TEXT}" for number in range(8)]
    settings = {"dtype": given.dtype, "enforce_eager": not given.compile}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base = given.base or make_base(folder, "llama", **SIZES)
        run = make_graft(folder, base=base, layers=[0, 1, 3])
        export_vllm([run], folder / "out", dtype=given.dtype)
        with engine(folder / "out", **settings) as ours, engine(base, **settings) as theirs:

            def asking(llm: Any) -> Any:
                def ask() -> list[list[int]]:
                    llm.reset_prefix_cache()
                    found = llm.generate(prompts, asked, use_tqdm=False)
                    return [list(one.outputs[0].token_ids) for one in found]

                return ask

            alike = asking(ours)() == asking(theirs)()
            pairs = alternate(asking(ours), asking(theirs), pairs=given.pairs, clock=clock(given))
    rate, tokens = pairs.ratio.inverse(), 32 * len(prompts)
    mine, its = (tokens / seconds for seconds in pairs.seconds)
    above = rate.below(GOAL)
    return Row(
        f"text through a graft of {base.name}, {'torch.compile' if given.compile else 'eager'}",
        "the base served alone",
        f"{rate} ({mine:.1f} of {its:.1f} tokens/s); ids {'equal' if alike else 'differ'}",
        f"at least {GOAL}",
        None if above is None else not above,
        {"ratio": vars(rate), "seconds": pairs.seconds, "alike": alike},
    )


def memory() -> list[Row]:
    """Weights in memory: of a tiny model in vLLM, and of a large one from shapes."""
    from mmgraft.export.vllm import export_vllm
    from tiny_exports import change_record, make_base, make_graft
    from vllm_engine import engine

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base = make_base(folder, "llama", **TINY, tie_word_embeddings=False)
        runs = [make_graft(folder, name=name, layers=list(range(3, 32, 4))) for name in ("a", "b")]
        for run in runs:
            change_record(run, workflow=run.name)
        export_vllm(runs, folder / "out")
        with engine(base) as llm:
            alone = held(llm)
        with engine(folder / "out") as llm:
            both = held(llm)
    rows = [(f"a tiny one in vLLM, {both:,} of 3 x {alone:,} weights", both / (3 * alone))]
    size = weights(LLAMA_3_8B, 2), weights(LLAMA_3_8B, 0)
    what = f"Llama-3-8B from shapes, {size[0]:,} of 3 x {size[1]:,} weights"
    rows.append((what, share(LLAMA_3_8B)))
    rows.append(("the tiny one from shapes", share(TINY)))
    return [
        Row(what, "three models", f"{part:.3f}", f"at most {MEMORY_GOAL}", part <= MEMORY_GOAL)
        for what, part in rows
    ]


def held(llm: Any) -> int:
    """Weights of the model that an engine holds, each once."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    return sum(one.numel() for one in model.parameters())


def main() -> int:
    parser = options(__doc__, pairs=10)
    parser.add_argument("--base", type=Path, help="folder of a language model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--memory", action="store_true", help="weights in memory instead")
    given = parser.parse_args()
    rows = memory() if given.memory else [speed(given)]
    return show(given, rows, {})


if __name__ == "__main__":
    sys.exit(main())
