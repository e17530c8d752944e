"""Measure the memory of a million rows: resident bytes above the process before it opened them.

Every kind of file is written, opened, mixed, ordered and read from in a process of its own. Bytes
are those of /proc/self/status: mapped pages of files count as well.

    python benchmarks/rows_memory.py --rows 1000000 --json rows.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

KINDS = ("jsonl", "json", "parquet", "tar")
LIMIT = 150e6  # bytes, of a million rows


def main() -> int:
    """Measure every kind and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--read", type=int, default=2000, help="rows that are read afterwards")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(Path(options.child), options.read)))
        return 0
    found: list[dict[str, Any]] = []
    print("| rows | of | file | to open | opened | mixed and ordered | after reading | peak |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = _write(Path(folder), kind, options.rows)
            command = [sys.executable, __file__, "--child", str(path), "--read", str(options.read)]
            environment = {**os.environ, "HF_DATASETS_CACHE": folder}
            ran = subprocess.run(command, capture_output=True, text=True, env=environment)
            if ran.returncode:
                raise SystemExit(ran.stderr)
            one = {"kind": kind, "size": path.stat().st_size, **json.loads(ran.stdout)}
        found.append(one)
        cells = [f"{one['rows']:,}", kind, f"{one['size'] / 1e6:.0f} MB", f"{one['seconds']:.0f} s"]
        cells += [f"{one[key] / 1e6:.0f} MB" for key in ("opened", "ordered", "read", "peak")]
        print(f"| {' | '.join(cells)} |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    over = [one["kind"] for one in found if one["read"] > LIMIT * max(1, one["rows"] / 1e6)]
    if over:
        print(f"more than 150 MB: {', '.join(over)}")
    return 1 if over else 0


def _rows(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of some 300 letters; three of four show one of a hundred pictures."""
    words = ("a", "red", "boat", "on", "the", "water", "under", "grey", "clouds", "near", "it")
    draw = random.Random(0)
    for number in range(count):
        content: Any = [{"type": "text", "text": f"What is there, and where? {number}"}]
        if number % 4:
            content.insert(0, {"type": "image", "image": f"{number % 100}.png"})
        answer = " ".join(draw.choices(words, k=12))
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        yield {"id": f"row-{number}", "messages": turns}


def _write(folder: Path, kind: str, count: int) -> Path:
    from PIL import Image

    path = folder / f"rows.{kind}"
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    picture = stream.getvalue()
    if kind in ("json", "jsonl"):
        for number in range(100):
            (folder / f"{number}.png").write_bytes(picture)
        with path.open("w") as file:
            file.write("[\n" if kind == "json" else "")
            between = ",\n" if kind == "json" else "\n"
            for number, row in enumerate(_rows(count)):
                file.write((between if number else "") + json.dumps(row))
            file.write("\n]\n" if kind == "json" else "\n")
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            for number, row in enumerate(_rows(count)):
                content = row["messages"][0]["content"]
                members = {"json": json.dumps(row).encode()}
                if number % 4:
                    content[0] = {"type": "image", "image": "png"}
                    members = {"png": picture, "json": json.dumps(row).encode()}
                for ending, data in members.items():
                    member = tarfile.TarInfo(f"{number:08}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                cast(Any, tar).members.clear()
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        part = pa.struct([("type", pa.string()), ("text", pa.string())])
        turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema(
            [("id", pa.string()), ("messages", pa.list_(turn)), ("images", pa.list_(image))]
        )
        with pq.ParquetWriter(path, schema) as writer:
            batch: list[dict[str, Any]] = []
            for number, row in enumerate(_rows(count), start=1):
                asked, answered = row["messages"]
                shown = [part for part in asked["content"] if part["type"] == "image"]
                for part in shown:
                    del part["image"]
                answered["content"] = [{"type": "text", "text": answered["content"]}]
                batch.append({**row, "images": [{"bytes": picture, "path": None} for _ in shown]})
                if len(batch) == 10_000 or number == count:
                    writer.write_table(pa.Table.from_pylist(batch, schema))
                    batch = []
    return path


def _measure(path: Path, read: int) -> dict[str, Any]:
    import torch

    from mmgraft.data.batches.sampler import EpochSampler, Part, mix
    from mmgraft.data.formats.sources import Source, index_rows

    torch.randperm(10)
    if path.suffix == ".parquet":
        import datasets  # noqa: F401 (the package itself is not what is measured)
    before, began = _status("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    rows = index_rows(Source(str(path)))
    seconds, opened = time.process_time() - began, _status("VmRSS") - before
    mixed = mix([Part(rows)])
    order = iter(EpochSampler(len(mixed)))
    first = next(order)
    ordered = _status("VmRSS") - before
    assert mixed[first].messages
    began = time.process_time()
    for _, at in zip(range(read), order, strict=False):
        assert mixed[at].messages
    return {
        "rows": len(rows),
        "seconds": seconds,
        "opened": opened,
        "ordered": ordered,
        "read": _status("VmRSS") - before,
        "peak": _status("VmHWM") - before,
        "seconds_a_row": (time.process_time() - began) / max(1, read),
    }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} in /proc/self/status: this needs Linux")


if __name__ == "__main__":
    sys.exit(main())
