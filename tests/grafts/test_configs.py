from __future__ import annotations

from typing import Any

import pytest

from mmgraft.errors import UsageError
from mmgraft.grafts.expert.config import ExpertConfig
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.grafts.llava.config import LlavaConfig
from mmgraft.grafts.lora.config import LoraConfig
from mmgraft.grafts.registry import moved
from mmgraft.grafts.wings.config import WingsConfig
from mmgraft.published.wings.config import OfficialWingsConfig
from mmgraft.strict import StrictModel

OFFICIAL = {"system_prompt_length": 14, "image_token_length": 16}


def said(config: type[StrictModel], **data: Any) -> str:
    with pytest.raises(UsageError) as caught:
        config.parse(data, "config")
    return str(caught.value)


def test_the_defaults_are_the_papers() -> None:
    iaa = IAAConfig(layers=[22, 24])
    assert (iaa.structure, iaa.embedding, iaa.norm, iaa.head, iaa.untie) == (
        "c",
        True,
        True,
        True,
        False,
    )
    wings = WingsConfig()
    assert (wings.layers, wings.rank, wings.heads, wings.variant) == ("all", 64, None, "paper")
    assert wings.learners == ["visual", "textual"]
    assert wings.base == LlavaConfig().base == "frozen"
    lora = LoraConfig()
    assert (lora.layers, lora.targets, lora.rank, lora.gate) == ("all", "all", 64, "row")
    assert (lora.scale, lora.dropout) == (2.0, 0.0)
    assert LoraConfig(rank=256, alpha=256).scale == 1.0
    expert = ExpertConfig()
    assert (expert.layers, expert.parts) == ("all", ["attention", "feedforward"])
    assert (expert.rank, expert.image_positions) == (None, "each")


@pytest.mark.parametrize(
    "config",
    [
        IAAConfig(layers="0-31:5"),
        WingsConfig(rank=8),
        LlavaConfig(),
        LoraConfig(alpha=3),
        ExpertConfig(parts=["attention"]),
    ],
)
def test_a_config_survives_json(config: StrictModel) -> None:
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_iaa_needs_layers() -> None:
    assert "'layers' is missing" in said(IAAConfig)


@pytest.mark.parametrize(("part", "other"), [("embedding", "head"), ("head", "embedding")])
def test_untie_needs_two_copies(part: str, other: str) -> None:
    text = said(IAAConfig, layers="all", untie=True, **{part: False})
    assert f"but {part} is false" in text
    assert f"set {part}: true or untie: false" in text
    assert IAAConfig(layers="all", untie=True, norm=False).untie


def test_learners_are_a_set_in_one_order() -> None:
    assert WingsConfig(learners=["textual", "visual"]).learners == ["visual", "textual"]
    assert "no learner is left" in said(WingsConfig, learners=[])
    assert "named twice" in said(WingsConfig, learners=["visual", "visual"])
    assert "'visual' or 'textual'" in said(WingsConfig, learners=["vision"])


@pytest.mark.parametrize(
    ("settings", "routed"),
    [({}, True), ({"learners": ["visual"]}, False), ({"router": False}, False)],
)
def test_a_router_takes_two_learners(settings: dict[str, Any], routed: bool) -> None:
    assert WingsConfig(**settings).routed is routed


@pytest.mark.parametrize("size", ["rank", "heads", "max_length"])
def test_sizes_are_positive(size: str) -> None:
    assert f"'{size}': Input should be greater than or equal to 1" in said(WingsConfig, **{size: 0})


def test_official_is_what_published_checkpoints_are() -> None:
    assert OfficialWingsConfig(**OFFICIAL).router_width == 4096
    stage_one = OfficialWingsConfig(**OFFICIAL, learners=["visual"], router=False)
    assert not stage_one.routed


@pytest.mark.parametrize("missing", ["system_prompt_length", "image_token_length"])
def test_official_needs_its_two_lengths(missing: str) -> None:
    data = {key: value for key, value in OFFICIAL.items() if key != missing}
    assert f"'{missing}' is missing" in said(OfficialWingsConfig, **data)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"heads": 4}, "unknown key 'heads'"),
        ({"learners": ["textual"]}, "[visual] for stage 1"),
        ({"router": False}, "learners: [visual]"),
    ],
)
def test_official_refuses_what_the_published_code_cannot(
    settings: dict[str, Any], text: str
) -> None:
    assert text in said(OfficialWingsConfig, **OFFICIAL, **settings)


def test_the_official_variant_is_a_method_of_its_own() -> None:
    old = {"method": "wings", "variant": "official", "heads": None, "base": "frozen", **OFFICIAL}
    method, config, note = moved("wings", old)
    assert (method, config) == ("wings-official", {"method": "wings-official", **OFFICIAL})
    assert note == "method: wings with variant: official is method: wings-official now"
    assert moved("wings", {**old, "heads": 4})[1]["heads"] == 4  # and so it is refused
    paper = {"method": "wings", "variant": "paper"}
    assert moved("wings", paper) == ("wings", paper, None)
