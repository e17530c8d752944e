from __future__ import annotations

from typing import Any

import pytest

from mmgraft.errors import UsageError
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.grafts.llava.config import LlavaConfig
from mmgraft.grafts.wings.config import WingsConfig
from mmgraft.strict import StrictModel

OFFICIAL = {"variant": "official", "system_prompt_length": 14, "image_token_length": 16}


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


@pytest.mark.parametrize("config", [IAAConfig(layers="0-31:5"), WingsConfig(rank=8), LlavaConfig()])
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
    assert WingsConfig(**OFFICIAL).router_width == 4096
    stage_one = WingsConfig(**OFFICIAL, learners=["visual"], router=False)
    assert not stage_one.routed


@pytest.mark.parametrize("missing", ["system_prompt_length", "image_token_length"])
def test_official_needs_its_two_lengths(missing: str) -> None:
    data = {key: value for key, value in OFFICIAL.items() if key != missing}
    assert f"needs {missing}: copy" in said(WingsConfig, **data)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"heads": 4}, "takes no heads"),
        ({"max_length": 100}, "takes no max_length"),
        ({"base": "full"}, "takes no base: it cannot be trained"),
        ({"learners": ["textual"]}, "no textual learner alone"),
        ({"router": False}, "set learners: [visual]"),
    ],
)
def test_official_refuses_what_the_published_code_cannot(
    settings: dict[str, Any], text: str
) -> None:
    assert text in said(WingsConfig, **OFFICIAL, **settings)


@pytest.mark.parametrize(
    "settings", [{"system_prompt_length": 0}, {"image_token_length": 9}, {"router_width": 2048}]
)
def test_paper_refuses_what_only_official_has(settings: dict[str, Any]) -> None:
    (name,) = settings
    assert f"{name} belongs to variant official" in said(WingsConfig, **settings)
