"""What a measurement says of a claim, worked out by hand for each of the four outcomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub_fixtures import make_record
from mmgraft.comparison.answers import SetAnswers
from mmgraft.comparison.claims import Claim, claims
from mmgraft.comparison.report_arms import MeasuredArm
from mmgraft.evaluation.items import Item
from mmgraft.evaluation.measured import Measured
from mmgraft.evaluation.results import Results, Score
from mmgraft.evaluation.set_spec import SetSpec
from report_example import a_set, identity, same, score, section, text_section

SPEC = SetSpec(name="colours", metric="exact")
COUNT = 40


def arm(name: str, method: str, *sections: Results, trained: bool = False, **config: Any) -> Any:
    record = make_record(method=method, config=config, base_trained=trained)
    return MeasuredArm(name, "", Path(name), record, {one.section: one for one in sections}, ())


def answered(no_image: dict[str, float] | None = None, **shares: float) -> SetAnswers:
    """Arms of which each has so large a share of the answers right, the first ones."""

    def measured(share: float) -> Measured:
        return Measured.means(accuracy=np.arange(COUNT) < share * COUNT)

    return SetAnswers(
        spec=SPEC,
        items=[Item(str(at), (), "?") for at in range(COUNT)],
        groups=[str(at) for at in range(COUNT)],
        said={},
        measured={name: measured(share) for name, share in shares.items()},
        no_image={name: measured(share) for name, share in (no_image or {}).items()},
        prior=measured(0.5),
        missing={},
    )


def about(found: list[Claim], words: str) -> list[tuple[list[str], str]]:
    return [(claim.arms, claim.verdict) for claim in found if words in claim.sentence]


def text_of(change: Score, name: str = "accuracy", kl: Score | None = None) -> Results:
    scores = {name: score(0.3), **({"kl_to_base": kl} if kl else {})}
    one = a_set("s", "choice", name, scores=scores, base={name: score(0.3)}, change={name: change})
    return section("text", [one], identity=identity(False))


@pytest.mark.parametrize(
    ("name", "change", "verdict"),
    [
        ("accuracy", score(-0.1, 0.05), "holds"),
        ("accuracy", score(0.1, 0.05), "does not hold"),
        ("accuracy", score(-0.01, 0.05), "not resolved"),
        ("accuracy", same(), "does not hold"),
        ("accuracy", Score(value=-0.1, low=-0.1, high=-0.1, count=9, groups=1), "not resolved"),
        ("perplexity", score(3.0, 1.0), "holds"),
        ("perplexity", score(-3.0, 1.0), "does not hold"),
    ],
)
def test_a_trained_base_loses_text(name: str, change: Score, verdict: str) -> None:
    found = claims([arm("full", "llava", text_of(change, name), trained=True)], [])
    words = "perplexity rises" if name == "perplexity" else "accuracy falls"
    assert about(found, words) == [(["full"], verdict)]
    assert not about(found, "frozen")


def test_kl_alone_says_whether_text_moved() -> None:
    for kl, verdict in ((score(0.2, 0.1), "holds"), (same(), "does not hold")):
        full = arm("full", "llava", text_of(same(), kl=kl), trained=True)
        assert about(claims([full], []), "moves its text") == [(["full"], verdict)]


def test_a_frozen_base_loses_nothing_only_where_all_is_the_same() -> None:
    proved = arm("iaa", "iaa", text_section())
    assert about(claims([proved], []), "frozen") == [(["iaa"], "holds")]
    moved = text_of(score(0.001, 0.0005))
    moved.identity = identity(True)
    assert about(claims([arm("iaa", "iaa", moved)], []), "frozen") == [(["iaa"], "does not hold")]
    differs = section("text", [], identity=identity(False))
    assert about(claims([arm("iaa", "iaa", differs)], []), "frozen") == [(["iaa"], "does not hold")]
    assert claims([arm("iaa", "iaa")], []) == []


def test_seeing_is_to_beat_each_blind_score() -> None:
    arms = [arm("iaa", "iaa"), arm("blind", "iaa")]
    found = claims(arms, [answered({"iaa": 0.9}, iaa=0.9, blind=0.5)])
    assert about(found, "blind (prior)") == [(["iaa"], "holds"), (["blind"], "does not hold")]
    assert about(found, "blind (no image)") == [(["iaa"], "does not hold")]


def test_methods_are_held_against_the_right_baseline() -> None:
    arms = [
        arm("full", "llava", trained=True),
        arm("projector", "llava"),
        arm("iaa", "iaa"),
        arm("wings", "wings"),
    ]
    found = claims(arms, [answered(full=0.9, projector=0.2, iaa=0.9, wings=0.55)])
    assert about(found, "Inserted layers see more than a projector") == [
        (["iaa", "projector"], "holds")
    ]
    assert about(found, "Learners see more than a projector") == [(["wings", "projector"], "holds")]
    # No less than: the same is enough, and less is too little.
    assert about(found, "Inserted layers on a frozen base see no less") == [
        (["iaa", "full"], "holds")
    ]
    assert about(found, "Learners see no less") == [(["wings", "full"], "does not hold")]
    (claim,) = [one for one in found if "Learners see no less" in one.sentence]
    assert claim.set == "colours"
    assert claim.measured.startswith("accuracy −0.350 (−")


def test_a_small_difference_is_not_resolved() -> None:
    arms = [arm("projector", "llava"), arm("iaa", "iaa")]
    found = claims(arms, [answered(projector=0.5, iaa=0.525)])
    assert about(found, "Inserted layers see more") == [(["iaa", "projector"], "not resolved")]


def test_ablations_compare_arms_that_are_alike_otherwise() -> None:
    arms = [
        arm("c", "iaa", structure="c", layers=[1]),
        arm("a", "iaa", structure="a", layers=[1], gate="linear"),
        arm("a2", "iaa", structure="a", layers=[1, 2]),
        arm("both", "wings", learners=["visual", "textual"], rank=4),
        arm("visual", "wings", learners=["visual"], rank=4, router=False),
    ]
    shares = {"c": 0.9, "a": 0.5, "a2": 0.5, "both": 0.5, "visual": 0.9}
    found = claims(arms, [answered(**shares)])
    assert about(found, "structure c sees more than structure a") == [(["c", "a"], "holds")]
    assert about(found, "both learners see more than the visual") == [
        (["both", "visual"], "does not hold")
    ]
    assert not about(found, "structure b")


def test_what_the_learners_change_of_the_shift_is_held_against_the_main_branch() -> None:
    def laws(added: Score) -> Results:
        series = "shift_main_and_learners"
        against_the_projector = {series: score(-0.5, 0.1)}  # resolved, and not what is claimed
        one = a_set("laws", "attention_shift", series, scores={series: score(0.2)},
                    change=against_the_projector)  # fmt: skip
        return section("laws", [one], details={"laws": {"learners_change": added.model_dump()}})

    smaller, larger, neither = score(-0.2, 0.1), score(0.2, 0.1), score(-0.01, 0.1)
    arms = [
        arm(name, "wings", laws(change))
        for name, change in (("w", smaller), ("v", larger), ("u", neither))
    ]
    found = claims(arms, [])
    assert about(found, "attention shifts less") == [
        (["w"], "holds"), (["v"], "does not hold"), (["u"], "not resolved"),
    ]  # fmt: skip
    assert found[0].measured.startswith("attention shift −0.200")
    assert not claims([arm("iaa", "iaa", laws(smaller))], [])
    assert not claims([arm("seeing", "wings", laws(score(0.0, 0.0)))], []), "0 by construction"


def test_a_proof_without_sets_speaks_of_logits_alone() -> None:
    (claim,) = claims([arm("iaa", "iaa", section("text", [], identity=identity(True)))], [])
    assert claim.measured == "every logit of 1,234 positions the same"


def test_an_ablation_is_no_ablation_where_rates_or_steps_differ() -> None:
    def trained(name: str, structure: str, **stage: Any) -> MeasuredArm:
        made = arm(name, "iaa", structure=structure)
        made.record.recipe = {"stages": [{"lr": 1e-3, "max_steps": 9, **stage}]}
        return made

    arms = [
        trained("c", "c", lr={"projector": 1e-3, "layers": 1e-3}),
        trained("a", "a"),
        trained("a-rate", "a", lr=2e-3),
        trained("a-steps", "a", max_steps=10),
    ]
    found = claims(arms, [answered(**{one.name: 0.5 for one in arms})])
    assert [names for names, _ in about(found, "structure a")] == [["c", "a"]]
