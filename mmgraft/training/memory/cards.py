"""Common cards, and what of their memory a training can have. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml


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


_DATA = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))


def cards() -> list[Card]:
    """Return all sizes, the smallest first."""
    fixed, share = _DATA["reserve"]["fixed_gb"], _DATA["reserve"]["share"]
    made = [
        Card(one["gb"], one["such_as"], round((one["gb"] * (1 - share) - fixed) * 1e9))
        for one in _DATA["cards"]
    ]
    return sorted(made, key=lambda card: card.gb)


def reserve() -> str:
    """Say what is left free on every card."""
    return f"{_DATA['reserve']['fixed_gb']:g} GB and {_DATA['reserve']['share']:.0%} of a card"


def smallest(needed: int) -> Card | None:
    """Find the smallest card that has so many bytes to give; None where none has."""
    return next((card for card in cards() if card.usable >= needed), None)
