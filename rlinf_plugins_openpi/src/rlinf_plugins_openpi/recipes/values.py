"""Take values out of a recipe, with their types checked; collect what is wrong, what was said and what is left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlinf_core.errors import did_you_mean
from rlinf_plugins_openpi.recipes.hydra_files import Keys
from rlinf_plugins_openpi.recipes.keys import NOT_HERE, NOT_NEEDED, reason


class Values:
    """The keys of a recipe that are not read yet, and everything that is to be said about the import.

    `problems` end the import, all at once. `warnings` are what changes the mathematics, or what a reader of the recipe
    would not expect. `unused` are keys without a counterpart, each with the reason.
    """

    def __init__(self, leaves: Mapping[Keys, Any]) -> None:
        self._left = {".".join(path): value for path, value in leaves.items()}
        self._all = dict(self._left)
        self.given = frozenset(key for key, value in self._left.items() if value is not None)
        """All keys of the recipe with a value."""
        self._known: set[str] = set()
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.unused: dict[str, str] = {}

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text; a number counts as its digits. `default` without a value, or for null."""
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self._wrong(key, value, "a text")
            return default
        return str(value)

    def number(
        self, key: str, default: float | None = None, *, positive: bool = False, below: float | None = None
    ) -> float | None:
        """A number, at least 0 or larger, and smaller than `below`."""
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._wrong(key, value, "a number")
            return default
        if value < 0 or (positive and not value) or (below is not None and value >= below):
            limits = "more than 0" if positive else "at least 0"
            self._wrong(key, value, limits + (f" and less than {below:g}" if below is not None else ""))
            return default
        return float(value)

    def integer(self, key: str, default: int | None = None, *, least: int | None = None) -> int | None:
        """A whole number, at least `least`."""
        value = self._take(key)
        if value is None:
            return default
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole:
            self._wrong(key, value, "a whole number")
            return default
        if least is not None and value < least:
            self._wrong(key, value, f"at least {least}")
            return default
        return int(value)

    def switch(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        self._wrong(key, value, "true or false")
        return default

    def anything(self, key: str) -> Any:
        """The value as it is; None without one."""
        return self._take(key)

    def below(self, table: str) -> dict[str, Any]:
        """All keys below a table, without its name, as they are."""
        prefix = f"{table}."
        return {key.removeprefix(prefix): self._take(key) for key in [*self._left] if key.startswith(prefix)}

    def pending(self, table: str) -> list[str]:
        """The keys below a table that nothing has read yet, without its name."""
        prefix = f"{table}."
        left = (key for key, value in self._left.items() if key.startswith(prefix) and value is not None)
        return [key.removeprefix(prefix) for key in left]

    def peek_integer(self, key: str) -> int | None:
        """A whole number that is read, and checked, elsewhere; None if it is something else."""
        value = self._all.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def peek_text(self, key: str) -> str | None:
        """A text that is read, and checked, elsewhere; None if it is something else."""
        value = self._all.get(key)
        return value if isinstance(value, str) else None

    def has(self, key: str) -> bool:
        """Whether the recipe gives the key a value, whether read or not."""
        return key in self.given

    def required(self, *keys: str) -> None:
        """Note those of the keys that the recipe does not have, before they are read."""
        missing = [key for key in keys if not self.has(key)]
        self.problems += [f"{key} is missing, and RLinf needs it" for key in missing]

    def refuse(self, key: str, why: str) -> None:
        """Note a value with which the recipe cannot be imported."""
        self.problems.append(f"{key}: {why}")

    def warn(self, text: str) -> None:
        """Note what changes the mathematics, or surprises."""
        self.warnings.append(text)

    def drop(self, key: str, why: str) -> None:
        """Note that a key has no counterpart."""
        self.unused[key] = why

    def finish(self, own: Mapping[str, str] | None = None, kind: str = "π0 or π0.5") -> None:
        """Explain all keys that nothing has read; those that RLinf does not have are problems.

        Args:
            own: Further keys that recipes of this kind may have -> why they change nothing.
            kind: The models of such recipes, for messages.
        """
        for key, value in self._left.items():
            if why := reason(key, own or {}) or reason(key, NOT_NEEDED):
                self.drop(key, why)
            elif why := reason(key, NOT_HERE):
                self.refuse(key, f"{why}; a recipe for {kind} does not have it. Leave it out: ~{key}")
            elif value is None and any(known.startswith(f"{key}.") for known in self._names()):
                continue  # A table without keys.
            else:
                self.refuse(key, f"unknown key{self._nearest(key)}. If RLinf ignores it, leave it out: ~{key}")

    def _take(self, key: str) -> Any:
        self._known.add(key)
        return self._left.pop(key, None)

    def _wrong(self, key: str, value: Any, what: str) -> None:
        self.refuse(key, f"{value!r} must be {what}")

    def _nearest(self, key: str) -> str:
        table, _, name = key.rpartition(".")
        siblings = {one.rpartition(".")[2] for one in self._names() if one.rpartition(".")[0] == table}
        if near := did_you_mean(name, siblings):
            return near
        elsewhere = sorted({one for one in self._names() if one.rpartition(".")[2] == name})
        return f"; did you mean {' or '.join(elsewhere[:2])}?" if elsewhere else ""

    def _names(self) -> Iterator[str]:
        yield from self._known
        yield from (pattern for pattern in NOT_NEEDED if "*" not in pattern)
