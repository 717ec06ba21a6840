"""Each recipe is a config, and its comment is what the plan says of the base's published config.json."""

import pytest

from qlora_ray.config import load_config
from tools import recipes


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda path: path.stem)
def test_forecast_in_the_comment_is_what_the_plan_says(recipe):
    said = recipe.read_text().partition(recipes.BEGIN)[2].partition(recipes.END)[0]
    assert said == recipes.forecast(recipe), "python -m tools.recipes"
    assert "does not fit" not in said
    assert f"rows of {load_config(recipe).training.max_length} tokens" in said


def test_there_are_eight():
    assert len(recipes.RECIPES) == 8
