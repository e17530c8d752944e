"""Words of the tables of results, in a report, a model card and a comparison. Free of torch."""

from collections.abc import Iterable
from typing import Any

from mmgraft.evaluation.report import words
from mmgraft.evaluation.report.markdown import as_code, plain
from mmgraft.runs.results import Score, SetResult

DIFFERENCE = f"graft\N{NO-BREAK SPACE}{words.MINUS}\N{NO-BREAK SPACE}base"
KL = "kl_to_base"
INTERVALS = (
    "Ranges are 95 % bootstrap intervals over the items; items about one image are resampled "
    "together."
)
SHOWN_DIGITS = 16
#: Setting of a set for which the base's scores were not measured a second time.
EQUAL = "equal by identity"

#: The text that each level is of.
WHERE = {"E1": "beside a row with an image", "E2": "before an image in its row"}
BLIND_NAMES = {"prior": "prior", "no_image": "no image"}


def identity_sentence(identity: dict[str, Any]) -> str:
    """Return the result of comparing the text workflow with the base, with all fingerprints.

    Args:
        identity: ``identity`` of the text section.
    """

    def digits(name: str) -> str:
        return as_code(str(identity.get(name, "-"))[:SHOWN_DIGITS])

    prints = f"SHA-256 of all logits: graft {digits('grafted')}, base {digits('base')}"
    if identity.get("graft_sha256") and identity.get("base_fingerprint"):
        prints += f"; of the weights: graft {digits('graft_sha256')}"
        prints += f", base {digits('base_fingerprint')}"
    where = f"on {identity['prompts']} prompts ({identity['positions']:,} positions)"
    if identity["identical"]:
        found = (
            f"is the base bit for bit: {where} every id and every logit is the same as of the "
            "base loaded without mmgraft"
        )
    else:
        found = (
            f"is not the base bit for bit: {where} logits differ by up to "
            f"{words.number(identity['max_difference'])}, first in "
            f"{plain(identity['first_difference'])}"
        )
    sentences = [f"The text workflow {found} ({prints})."]
    for level, one in identity.get("levels", {}).items():
        same = "is" if one["identical"] else "is not"
        sentences.append(f"Text {WHERE[level]} ({level}) {same} the base's bit for bit.")
    return " ".join(sentences)


def set_verdict(one: SetResult, name: str) -> str:
    """Return what the change of a set's score comes to; an lm-eval task says what is better."""
    stated = one.settings.get("higher_is_better")
    higher = stated.get(name.partition(",")[0]) if isinstance(stated, dict) else None
    sense = words.direction(name) if not isinstance(higher, bool) else 1 if higher else -1
    return words.verdict(one.change.get(name), name, sense)


def blind_score(one: SetResult | None, blind: str, name: str | None = None) -> Score | None:
    """Return a set's score of answering blind; by default the main one."""
    return None if one is None else one.blind.get(blind, {}).get(name or one.main)


def blind_of(sets: Iterable[SetResult]) -> dict[str, str]:
    """Return the blind scores that sets have with their titles, known ones first."""
    found = {name for one in sets for name in one.blind}
    names = [name for name in BLIND_NAMES if name in found] + sorted(found - set(BLIND_NAMES))
    return {name: BLIND_NAMES.get(name, name) for name in names}
