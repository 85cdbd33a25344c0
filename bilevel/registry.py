"""Registries: classes by the name that the command line and the tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

__all__ = [
    "INNER_SOLVERS",
    "LINEAR_SOLVERS",
    "METHODS",
    "PRECONDITIONERS",
    "PROBLEMS",
    "Registry",
]

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name, in the order of registration.

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register("circle")
        ... class Circle:
        ...     "A round shape."
        >>> shapes.names()
        ['circle']
        >>> type(shapes.build("circle")).__name__
        'Circle'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that registers under ``name``.

        Raises:
            ValueError: The name is taken.
        """

        def add(cls: type[T]) -> type[T]:
            # A module that is run again registers what it registered before.
            known = self._classes.get(name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"the {self.kind} '{name}' is registered already; choose another")
            self._classes[name] = cls
            return cls

        return add

    def build(self, name: str, **arguments: Any) -> T:
        """Build the class registered under ``name`` from keyword arguments.

        Raises:
            ValueError: There is no such name, or the arguments do not fit.
        """
        cls = self[name]
        try:
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(f"{self.kind} '{name}': {error}") from error

    def names(self) -> list[str]:
        """All names."""
        return list(self._classes)

    def summary(self, name: str) -> str:
        """First line of the class's docstring."""
        return (self[name].__doc__ or "").strip().partition("\n")[0]

    def name_of(self, cls: type[Any]) -> str | None:
        """The name of a registered class, or None."""
        return next((name for name, c in self._classes.items() if c is cls), None)

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            known = ", ".join(self._classes) or "none; import bilevel.solvers and bilevel.problems"
            raise ValueError(f"there is no {self.kind} '{name}'; known: {known}")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


INNER_SOLVERS: Registry[Any] = Registry("inner solver")
METHODS: Registry[Any] = Registry("hypergradient method")
LINEAR_SOLVERS: Registry[Any] = Registry("linear solver")
PRECONDITIONERS: Registry[Any] = Registry("preconditioner")
PROBLEMS: Registry[Any] = Registry("problem")
