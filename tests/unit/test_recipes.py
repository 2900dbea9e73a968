"""Recipes: which is prepared, which are in memory, and how others take their place."""

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np

from calibration.calibration import Provenance, fit
from daemon.contract import Identity
from daemon.quality import StationQuality
from daemon.recipes import Recipe, Recipes
from detectors.template import TemplateDetector

IMAGE = np.zeros((4, 4, 3), np.uint8)
CALIBRATION = fit([1.0, 2.0, 3.0], alpha=0.3, provenance=Provenance("m" * 64, "d", datetime.now(UTC)))


class Shelf:
    """Makes recipes, and remembers which, in order."""

    def __init__(self, *names: str, model: str = "one") -> None:
        self.loads: dict[str, Callable[[], Recipe]] = {name: self._load(n, name) for n, name in enumerate(names, 1)}
        self.model = model
        self.made: list[str] = []

    def _load(self, index: int, name: str) -> Callable[[], Recipe]:
        def load() -> Recipe:
            self.made.append(name)
            identity = Identity("i", "n", "top", "b", self.model, "f" * 64, CALIBRATION.id, 0.3, name, index)
            return Recipe(identity, TemplateDetector(IMAGE), CALIBRATION, StationQuality("top", CALIBRATION))

        return load


def test_all_are_loaded_once_at_first_and_those_beyond_the_limit_are_let_go_of() -> None:
    shelf = Shelf("a", "b", "c", "d")
    recipes = Recipes(shelf.loads, "b", held=2)
    assert sorted(shelf.made) == ["a", "b", "c", "d"]
    assert recipes.current.name == "b"
    assert [name for name in "abcd" if recipes.loaded(name)] == ["a", "b"]
    assert [(one.recipe, one.recipe_index) for one in recipes.identities] == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]


def test_the_ones_prepared_last_stay_in_memory() -> None:
    shelf = Shelf("a", "b", "c")
    recipes = Recipes(shelf.loads, held=2)
    shelf.made.clear()
    for name in ("b", "a", "c", "a"):
        recipes.prepare(recipes.load(name))
    assert recipes.current.name == "a"
    assert shelf.made == ["c"]
    assert [name for name in "abc" if recipes.loaded(name)] == ["a", "c"]


def test_what_is_prepared_is_always_in_memory() -> None:
    shelf = Shelf("a", "b")
    recipes = Recipes(shelf.loads, held=1)
    recipes.prepare(recipes.load("b"))
    assert recipes.loaded("b") is recipes.current
    assert recipes.loaded("a") is None


def test_an_unknown_name_starts_with_the_first_and_is_not_found() -> None:
    recipes = Recipes(Shelf("a", "b").loads, "gone")
    assert recipes.current.name == "a"
    assert recipes.find("gone", None) is None
    found = recipes.find(None, 2)
    assert found is not None
    assert found.recipe == "b"


def test_others_take_the_place_of_all_and_what_was_prepared_keeps_its_name() -> None:
    recipes = Recipes(Shelf("a", "b", "c").loads, "b")
    before = recipes.current
    new = Shelf("b", "d", model="two")
    fresh = {name: load() for name, load in new.loads.items()}
    recipes.replace(new.loads, {name: one.identity for name, one in fresh.items()}, fresh)
    assert recipes.current is fresh["b"] is not before
    assert [one.recipe for one in recipes.identities] == ["b", "d"]
    assert recipes.find("a", None) is None
    assert recipes.load("d").identity.model == "two"


def test_what_is_not_new_stays_as_it_is() -> None:
    shelf = Shelf("a", "b")
    recipes = Recipes(shelf.loads)
    before = recipes.current, recipes.loaded("b")
    recipes.replace(shelf.loads, {one.recipe: one for one in recipes.identities}, {})
    assert (recipes.current, recipes.loaded("b")) == before


def test_what_is_prepared_judges_on_even_if_it_is_taken_away() -> None:
    recipes = Recipes(Shelf("a", "b").loads, "b")
    before, other = recipes.current, Shelf("a")
    recipes.replace(other.loads, {"a": other.loads["a"]().identity}, {})
    assert [one.recipe for one in recipes.identities] == ["a"]
    assert recipes.current is before
    recipes.prepare(recipes.load("a"))
    assert recipes.current.name == "a"
