"""What a station can judge its parts by, what of it is in memory, and which of it is prepared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock

from calibration.calibration import Calibration
from daemon.contract import Identity
from daemon.quality import StationQuality
from daemon.regions import PLAIN, Rule
from detectors.base import Detector

HELD = 8
"""Recipes of a station that are in memory at most, unless told otherwise."""


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


Load = Callable[[], Recipe]
"""Makes a recipe ready to judge, its model proven. Takes seconds; may raise what `build` does."""


class Recipes:
    """A station's recipes by name, in the order of their numbers; one is prepared. Any thread may call.

    Those that were prepared last are in memory. A part is judged by the recipe that is prepared when it comes, whatever
    is prepared before it is judged.
    """

    def __init__(self, loads: Mapping[str, Load], prepared: str | None = None, *, held: int = HELD) -> None:
        """Start with the recipe of that name, or else, or if there is none such, with the first.

        All are loaded once, so that a fault of any is known now.

        Raises:
            ArtifactError, CalibrationError, ConfigError: as loading does.
        """
        self._lock = Lock()
        self._held = held
        self._loads = dict(loads)
        first = prepared if prepared in self._loads else next(iter(self._loads))
        self._recent: dict[str, Recipe] = {}  # the least recently prepared first
        self._known: dict[str, Identity] = {}
        for name in [*(name for name in reversed(self._loads) if name != first), first]:
            self._hold(self._loads[name]())
        self._current = self._recent[first]

    @property
    def current(self) -> Recipe:
        """The one that is prepared."""
        return self._current

    @property
    def identities(self) -> list[Identity]:
        """Who speaks when each of them is prepared, by their numbers."""
        with self._lock:
            return [self._known[name] for name in self._loads]

    def find(self, name: str | None, index: int | None) -> Identity | None:
        """The recipe of a name, or of a number from 1."""
        return next((one for one in self.identities if name == one.recipe or index == one.recipe_index), None)

    def loaded(self, name: str) -> Recipe | None:
        """The recipe of a name, if it is in memory."""
        with self._lock:
            return self._recent.get(name)

    def load(self, name: str) -> Recipe:
        """The recipe of a name, loaded if it is not in memory; nothing is changed by that.

        Raises:
            KeyError: there is none of this name any more.
            ArtifactError, CalibrationError, ConfigError: as loading does.
        """
        with self._lock:
            load, loaded = self._loads[name], self._recent.get(name)
        return loaded or load()

    def prepare(self, recipe: Recipe) -> None:
        """Judge what comes from now on by it, or by what has taken its place meanwhile."""
        with self._lock:
            present = self._recent.get(recipe.name)
            if present is not None and self._known[recipe.name] != recipe.identity:
                recipe = present
            self._hold(recipe)
            self._current = recipe

    def replace(
        self, loads: Mapping[str, Load], identities: Mapping[str, Identity], fresh: Mapping[str, Recipe]
    ) -> None:
        """Let others take the place of all, from the next part on. What is prepared keeps its name.

        If there is none of that name any more, for it was prepared a moment ago, parts are judged by the old one still.

        Args:
            loads: of all the names that there are from now on, by their numbers.
            identities: of the same.
            fresh: what was loaded anew, verified; others that are in memory stay.
        """
        with self._lock:
            recent = {name: fresh.get(name, recipe) for name, recipe in self._recent.items() if name in loads}
            self._current = recent.get(self._current.name, self._current)
            self._recent, self._loads, self._known = recent, dict(loads), dict(identities)

    def _hold(self, recipe: Recipe) -> None:
        self._known[recipe.name] = recipe.identity
        self._recent.pop(recipe.name, None)
        self._recent[recipe.name] = recipe
        while len(self._recent) > self._held:
            del self._recent[next(iter(self._recent))]
