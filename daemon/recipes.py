"""What a station can judge its parts by, and which of it is prepared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from calibration.calibration import Calibration
from daemon.contract import Identity
from daemon.quality import StationQuality
from daemon.regions import PLAIN, Rule
from detectors.base import Detector


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that one kind of part is judged by. `identity` says it to subscribers."""

    identity: Identity
    detector: Detector
    calibration: Calibration
    quality: StationQuality
    rule: Rule = PLAIN

    @property
    def name(self) -> str:
        """How commands call it."""
        return self.identity.recipe


class Recipes:
    """A station's recipes, all of them loaded; one is prepared. Any thread may ask, one prepares.

    A part is judged by the recipe that is prepared when it comes, whatever is prepared before it is judged.
    """

    def __init__(self, recipes: Sequence[Recipe], prepared: str | None = None) -> None:
        """Start with the recipe of that name, or else, or if there is none such, with the first."""
        self._recipes = {recipe.name: recipe for recipe in recipes}
        self._current = self._recipes.get(prepared or "", recipes[0])

    @property
    def current(self) -> Recipe:
        """The one that is prepared."""
        return self._current

    def __iter__(self) -> Iterator[Recipe]:
        return iter(self._recipes.values())

    def __getitem__(self, name: str) -> Recipe:
        return self._recipes[name]

    def find(self, name: str | None, index: int | None) -> Recipe | None:
        """The recipe of a name, or of a number from 1."""
        return next((one for one in self if name == one.name or index == one.identity.recipe_index), None)

    def prepare(self, recipe: Recipe) -> None:
        """Judge what comes from now on by it."""
        self._current = recipe
