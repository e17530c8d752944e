"""Make-believe CUDA cards over main memory, for tests on a machine without one.

    with pretend_cuda() as card:
        model = model.to("cuda")
        model(input_ids=ids)            # RuntimeError: ids are on the CPU
        model(input_ids=ids.to("cuda"))
    print(card.report())

A tensor on a card is a wrapper that torch itself takes for one of ``cuda:0`` (``.device``,
``.is_cuda``, autocast's CUDA lists, autograd's device thread) around a real tensor on the CPU. An
operation that mixes devices is refused where CUDA refuses it; any other is computed on the real
tensors. Where CUDA would make the host wait for the card (``.item()``, ``nonzero``, a boolean mask,
a blocking copy), the line of code is counted.

It shows where tensors lie and where the host waits. It shows nothing of speed, of memory, of CUDA's
own kernels and their rounding, or of streams. Import it before the first backward pass of the
process, which counts the devices once; one process holds up to two cards.
"""

from pretend_cuda.seen import Card, kernel_of
from pretend_cuda.switch import WHY_NOT, pretend_cuda
from pretend_cuda.tensors import CARD, OnCard

__all__ = ["CARD", "WHY_NOT", "Card", "OnCard", "kernel_of", "pretend_cuda"]
