"""Questions a second of `mmgraft eval` at several batch sizes, and what batching gains.

    python benchmarks/eval_batching.py RUN [--questions 256] [--threads 2] [--rounds 3]

RUN is a run of the demo (`mmgraft demo`), or any graft: the questions are easy-VQA's. The tower's
features are computed first, as an evaluation does. Each size is timed in turn, round after round,
so that what else the machine does falls on all of them; the best round of each counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

SIZES = (1, 8, 32)
ANSWER_TOKENS = 4


def main() -> int:
    """Measure, print a table, and say whether batching gains what is wanted."""
    options = _options()
    import torch

    torch.set_num_threads(options.threads)
    from mmgraft.data.rows import Row
    from mmgraft.demo import easy_vqa
    from mmgraft.evaluation.generate.answers import answer
    from mmgraft.evaluation.generate.run_features import run_features
    from mmgraft.inference import Answerer
    from mmgraft.training.devices import pick_device

    answerer = Answerer.load(options.run, device=pick_device(options.device), dtype=options.dtype)
    root = easy_vqa.folder()
    asked = easy_vqa.draw(easy_vqa.questions("test"), options.questions, seed=2026)
    rows = [Row(str(at), easy_vqa.prompt(question, root)) for at, question in enumerate(asked)]
    features = run_features(answerer.model, options.run, rows)

    def ask(size: int, count: int) -> tuple[float, float]:
        """Questions a second by the clock, and a second of processor time."""
        start = time.perf_counter(), time.process_time()
        answer(
            answerer.model,
            answerer.processor,
            [row.messages for row in rows[:count]],
            batch_size=size,
            max_new_tokens=ANSWER_TOKENS,
            features=features,
        )
        clock, processor = time.perf_counter() - start[0], time.process_time() - start[1]
        return count / clock, count / processor

    ask(2, 4)  # first calls compile and allocate
    best = dict.fromkeys(options.sizes, (0.0, 0.0))
    for _ in range(options.rounds):
        for size in options.sizes:
            made = ask(size, min(len(rows), max(24, 8 * size)))
            best[size] = max(best[size][0], made[0]), max(best[size][1], made[1])
    first = best[options.sizes[0]]
    report = {
        "device": str(answerer.model.device),
        "dtype": str(answerer.model.base.dtype).removeprefix("torch."),
        "threads": options.threads,
        "sizes": {
            size: {
                "questions_per_second": round(clock, 2),
                "gain": round(clock / first[0], 2),
                "questions_per_processor_second": round(processor, 2),
                "processor_gain": round(processor / first[1], 2),
            }
            for size, (clock, processor) in best.items()
        },
    }
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return 0
    sys.stdout.write(
        f"{report['device']}, {report['dtype']}, {options.threads} threads\n"
        "batch   questions/s   gain   questions/processor second   gain\n"
    )
    for size, (clock, processor) in best.items():
        sys.stdout.write(
            f"{size:5d} {clock:13.1f} {clock / first[0]:6.2f} {processor:28.1f} "
            f"{processor / first[1]:6.2f}\n"
        )
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a graft")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="batch sizes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
