from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from mmgraft.errors import UsageError
from mmgraft.strict import LayerChoice, StrictModel


class Cat(StrictModel):
    method: Literal["cat"] = "cat"
    whiskers: int = 12


class Dog(StrictModel):
    method: Literal["dog"] = "dog"
    tail: bool = True


class Stage(StrictModel):
    name: str
    learning_rate: float = Field(1e-3, gt=0)


class Recipe(StrictModel):
    stages: list[Stage]
    pet: Annotated[Cat | Dog, Field(discriminator="method")] = Cat()
    layers: LayerChoice = "all"


def said(data: object) -> str:
    with pytest.raises(UsageError) as caught:
        Recipe.parse(data, "recipe x.yaml")
    return str(caught.value)


def test_what_is_right_is_built() -> None:
    recipe = Recipe.parse({"stages": [{"name": "one"}], "pet": {"method": "dog"}}, "recipe")
    assert recipe.stages[0].name == "one"
    assert isinstance(recipe.pet, Dog)


def test_an_unknown_key_is_named_with_the_nearest_right_one() -> None:
    assert said({"stages": [], "layer": "all"}) == (
        "recipe x.yaml: unknown key 'layer'; did you mean 'layers'?"
    )


def test_the_nearest_key_is_looked_for_where_the_wrong_one_stands() -> None:
    data = {"stages": [{"name": "a"}, {"name": "b", "lerning_rate": 1.0}]}
    assert "unknown key 'stages[1].lerning_rate'; did you mean 'learning_rate'?" in said(data)
    data = {"stages": [], "pet": {"method": "dog", "tale": False}}
    assert "did you mean 'tail'?" in said(data)


def test_every_problem_has_its_line() -> None:
    text = said({"stages": [{"learning_rate": -1}], "zzz": 1})
    assert text.startswith("recipe x.yaml has 3 problems:\n")
    assert "'stages[0].name' is missing; add it" in text
    assert "'stages[0].learning_rate': Input should be greater than 0 (got -1)" in text
    assert "unknown key 'zzz'; known: stages, pet, layers" in text


def test_a_long_value_is_cut() -> None:
    assert len(said({"stages": "x" * 500})) < 200


def test_layers_are_checked_in_form() -> None:
    choice = TypeAdapter(LayerChoice)
    assert choice.validate_python(22) == [22]
    assert choice.validate_python((1, 2)) == [1, 2]
    assert choice.validate_python("last:8") == "last:8"
    for wrong in ("22;24", True, 1.5, None, [1, 1], [-1]):
        with pytest.raises(ValidationError):
            choice.validate_python(wrong)
    assert said({"stages": [], "layers": [3, 3]}).count("layers") == 1


def test_assignment_is_checked_too() -> None:
    stage = Stage(name="one")
    with pytest.raises(ValidationError):
        stage.learning_rate = -1.0
