"""Common cards, and what of their memory a training can have. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

_FILE = Path(__file__).with_name("cards.yaml")


@dataclass(frozen=True)
class Card:
    """A size of card.

    Attributes:
        gb: Its memory in 1e9 bytes, as it is sold.
        such_as: Cards of that size.
        usable: Bytes that a training can have.
    """

    gb: int
    such_as: str
    usable: int


@cache
def cards() -> tuple[Card, ...]:
    """Return all sizes, the smallest first."""
    data = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    fixed, share = data["reserve"]["fixed_gb"], data["reserve"]["share"]
    made = [
        Card(one["gb"], one["such_as"], round((one["gb"] * (1 - share) - fixed) * 1e9))
        for one in data["cards"]
    ]
    return tuple(sorted(made, key=lambda card: card.gb))


def reserve() -> str:
    """Say what is left free on every card."""
    data = yaml.safe_load(_FILE.read_text(encoding="utf-8"))["reserve"]
    return f"{data['fixed_gb']:g} GB and {data['share']:.0%} of a card"


def smallest(needed: int) -> Card | None:
    """Find the smallest card that has so many bytes to give; None where none has."""
    return next((card for card in cards() if card.usable >= needed), None)
