"""Captions against what people wrote: CIDEr-D."""

import math
import re
from collections import Counter
from collections.abc import Sequence

from mmgraft.evaluation.metrics.intervals import Measured

ORDERS = 4
SIGMA = 6.0
SCALE = 10.0
_NGram = tuple[str, ...]
_Vector = dict[_NGram, float]
_WORD = re.compile(
    r"[぀-ヿ㐀-鿿]"  # scripts without spaces: by character
    r"|[^\W_぀-ヿ㐀-鿿]+?(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b"
    r"|[^\W_぀-ヿ㐀-鿿]+(?:[-.][^\W_぀-ヿ㐀-鿿]+)*"
)


def words_of(caption: str) -> list[str]:
    """Return the words that captions are compared by.

    Lower case, no punctuation; "dog's" is "dog", "'s" and "isn't" is "is", "n't", and words with a
    hyphen stay whole, as in the Penn Treebank's way of cutting that the COCO evaluation uses.
    Chinese and Japanese are cut into characters.
    """
    return _WORD.findall(caption.lower().replace("’", "'"))


class CiderD:
    """CIDEr-D, ready to score captions of a set.

    Source: Vedantam, Zitnick, Parikh 2015, CIDEr: Consensus-based Image Description Evaluation
    (arXiv 1411.5726). An n-gram ``w`` of a caption weighs its count times ``log(N / df(w))`` (eq.
    1), of ``N`` items of which ``df`` (at least 1) have it in a reference. For n = 1 to 4 the
    weights of a caption ``c`` and a reference ``r`` are compared by

        ``exp(-(len c - len r)^2 / (2 sigma^2)) * sum min(c, r) r / (|c| |r|)``, sigma = 6 (eq. 4),

    where lengths are in words. The score is ten times the mean over references and the four n
    (eqs. 3 and 5). Hence the right caption scores 10 with one reference, and where it has fewer
    than four words less: two words that no other item has score 5.

    Args:
        references: What people wrote of each item: of two items at least, else every weight is 0,
            with a word at least.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        counts = [[_counted(text) for text in texts] for texts in references]
        self._frequency: Counter[_NGram] = Counter()
        for item in counts:
            self._frequency.update({ngram for one in item for ngram in one})
        self._log_items = math.log(len(references))
        self._references = [[self._weighted(one) for one in item] for item in counts]

    def score(self, index: int, caption: str) -> float:
        """Return the score of a caption of one item, 0 to 10."""
        given = self._weighted(_counted(caption))
        references = self._references[index]
        return SCALE * sum(_similarity(given, one) for one in references) / len(references)

    def _weighted(self, counts: Counter[_NGram]) -> tuple[list[_Vector], int]:
        """Return weights of n-grams by n, and how many words the caption has."""
        vectors: list[_Vector] = [{} for _ in range(ORDERS)]
        for ngram, count in counts.items():
            rarity = self._log_items - math.log(max(self._frequency[ngram], 1))
            vectors[len(ngram) - 1][ngram] = count * rarity
        return vectors, sum(count for ngram, count in counts.items() if len(ngram) == 1)


def measure_captions(given: Sequence[str], cider: CiderD) -> Measured:
    """Measure the mean CIDEr-D; its interval resamples items and leaves their weights as they are.

    Args:
        given: Captions of a model, in the order of the references.
        cider: Of the references.
    """
    return Measured.means(cider=[cider.score(at, caption) for at, caption in enumerate(given)])


def _counted(caption: str) -> Counter[_NGram]:
    words = words_of(caption)
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, ORDERS + 1)
        for start in range(len(words) - n + 1)
    )


def _similarity(given: tuple[list[_Vector], int], reference: tuple[list[_Vector], int]) -> float:
    """Return the mean over n of eq. 4."""
    total = 0.0
    for one, other in zip(given[0], reference[0], strict=True):
        norms = _norm(one) * _norm(other)
        if norms:
            shared = one.keys() & other.keys()
            total += sum(min(one[key], other[key]) * other[key] for key in shared) / norms
    gap = given[1] - reference[1]
    return math.exp(-(gap**2) / (2 * SIGMA**2)) * total / ORDERS


def _norm(vector: _Vector) -> float:
    return math.sqrt(sum(weight**2 for weight in vector.values()))
