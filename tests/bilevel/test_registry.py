from dataclasses import dataclass

import pytest

import bilevel.solvers as solvers
from bilevel import HypergradientMethod, InnerSolver, LinearSolver
from bilevel.registry import INNER_SOLVERS, LINEAR_SOLVERS, METHODS, Registry


@pytest.fixture
def shapes():
    registry = Registry("shape")

    @registry.register("circle")
    @dataclass(frozen=True)
    class Circle:
        """A round shape.

        With a radius.
        """

        radius: float = 1.0

    return registry


def test_a_class_is_built_by_name(shapes):
    assert shapes.build("circle", radius=2.0).radius == 2.0


def test_a_registry_is_a_container(shapes):
    assert "circle" in shapes
    assert "square" not in shapes
    assert list(shapes) == ["circle"] == shapes.names()
    assert len(shapes) == 1
    assert shapes.summary("circle") == "A round shape."
    assert shapes.name_of(shapes["circle"]) == "circle"
    assert shapes.name_of(int) is None


def test_an_unknown_name_lists_the_known_ones(shapes):
    with pytest.raises(ValueError, match="there is no shape 'square'; known: circle"):
        shapes.build("square")


def test_arguments_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"shape 'circle': .*side"):
        shapes.build("circle", side=1)


def test_a_name_is_taken_once(shapes):
    with pytest.raises(ValueError, match="'circle' is registered already"):
        shapes.register("circle")(int)


def test_an_empty_registry_says_what_to_import():
    with pytest.raises(ValueError, match=r"import bilevel\.solvers"):
        Registry("shape").build("circle")


KINDS = [
    (INNER_SOLVERS, InnerSolver),
    (METHODS, HypergradientMethod),
    (LINEAR_SOLVERS, LinearSolver),
]


@pytest.mark.parametrize(("registry", "base"), KINDS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_public_solver_is_registered_with_a_summary(registry, base):
    public = [
        value
        for value in vars(solvers).values()
        if isinstance(value, type) and issubclass(value, base)
    ]
    assert public
    for cls in public:
        name = registry.name_of(cls)
        assert name is not None, cls
        assert registry[name] is cls
        assert registry.summary(name).endswith(".")
    assert set(public) == {registry[name] for name in registry}
