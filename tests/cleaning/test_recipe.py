"""Recipes: shipped ones load, mistakes are told all at once."""

import json

import pytest

from megagpt.cleaning.recipe import Recipe, describe_keys, flatten, load_recipe, recipe_names, unflatten
from megagpt.errors import ConfigError


def test_shipped_recipes_load_and_survive_json():
    assert "web" in recipe_names()
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.exact_duplicates is not None
        assert unflatten(json.loads(json.dumps(flatten(recipe)))) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("htlm=true", "htlm: unknown step; did you mean html?"),
        ("html.contnt=all", "html.contnt: unknown key; did you mean content?"),
        ("html.content=some", "html.content='some' must be one of 'main' or 'all'"),
        ("quality.min_words=-3", "quality.min_words=-3 must be at least 0"),
        ("repetition.max_top_n_grams=[[2, 3.0]]", "repetition.max_top_n_grams=[[2, 3.0]]: 0.1 must be at most 1.0"),
        ("near_duplicates=", "near_duplicates is empty; write `true` (with its defaults), `false` (left out) or keys"),
        ("evaluation={}", "evaluation.texts is missing; write it"),
        ("c4=7", "c4=7 must be true, false or a section with keys of its own"),
        ("personal_data.patterns=[{regex: '(', replacement: x}]", "personal_data.patterns=[{"),
        ("language.keep=en", "language.keep='en' must be a list"),
        ("language.keep=[xx]", "language.keep=['xx']"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe("web", [override])
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"web with the command line's overrides: {message}")


def test_all_mistakes_of_a_file_are_told(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("quality: {min_wrods: 3, max_words: many}\nlangauge: true\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match=r"is not a shipped recipe; use one of .*web"):
        load_recipe("wbe")


def test_steps_are_switched_by_true_and_false():
    recipe = load_recipe("web", ["html=false", "length.max_characters=100", "near_duplicates.buckets=20"])
    assert recipe.html is None
    assert recipe.length is not None
    assert recipe.near_duplicates is not None
    assert recipe.near_duplicates.buckets == 20


def test_all_keys_are_described():
    text = describe_keys()
    for step in Recipe.model_fields:
        assert f"\n{step}: " in f"\n{text}"
    assert "near_duplicates.buckets (default: 14): Number of buckets." in text
    assert "(default: None): \n" not in text
