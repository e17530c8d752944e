"""A product of two thin matrices, which many methods learn instead of a whole one."""

from torch import Tensor, nn


class LowRank(nn.Module):
    """``x W_a W_b`` with ``W_a: h -> r`` Gaussian and ``W_b: r -> h`` zero: a new one adds 0.

    Args:
        size: Width ``h`` of what goes in and comes out.
        rank: Width ``r`` between the two.
    """

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, size, bias=False)
        nn.init.normal_(self.down.weight, std=size**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))
