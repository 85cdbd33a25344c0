"""The graph of levels: what may be in it, the order of solving, and the routes of derivatives.

An edge u → v says that the variable of u enters the objective of v: v is solved for a given u, and
u, like all that is above it, sees the solution of v. networkx is imported where it is used, since
many who import the library have no levels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from .errors import StructureError
from .level import Level

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["LevelPlan", "check_graph", "generations", "graph_of", "listed", "order", "routes"]
__all__ += ["top_of"]


def graph_of(levels: Sequence[Level], edges: Iterable[tuple[str, str]]) -> nx.DiGraph:
    """A graph whose nodes are the levels' names, with the `Level` as attribute ``level``.

    Raises:
        ValueError: Two levels have one name, or an edge names no level.
    """
    import networkx as nx

    graph = nx.DiGraph()
    for level in levels:
        if not isinstance(level, Level):
            raise ValueError(f"`levels` holds a {type(level).__name__}; pass instances of Level")
        if level.name in graph:
            raise ValueError(
                f"two levels are named {level.name!r}; give each a name of its own, since edges "
                "and objectives refer to it"
            )
        graph.add_node(level.name, level=level)
    for edge in edges:
        if isinstance(edge, str) or len(edge) != 2:
            raise ValueError(f"`edges` holds {edge!r}; pass pairs (above, below) of names")
        source, target = edge
        for end in (source, target):
            if end not in graph:
                raise ValueError(
                    f"the edge {_arrow(source, target)} names {end!r}, but there is no such level; "
                    f"the levels are {listed(graph)}"
                )
        graph.add_edge(source, target)
    return graph


def check_graph(graph: nx.DiGraph) -> None:
    """Refuse a graph that states no problem of nested levels.

    Raises:
        ValueError: A node holds no level, or one of another name; or a level cannot be solved.
        StructureError: There is a cycle, or not exactly one top.
    """
    import networkx as nx

    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise ValueError(f"`graph` is a {type(graph).__name__}; pass a networkx.DiGraph")
    for name, attributes in graph.nodes(data=True):
        level = attributes.get("level")
        if not isinstance(level, Level):
            raise ValueError(
                f"node {name!r} holds no level; add it as graph.add_node({name!r}, "
                "level=Level(...)), or correct the edge that names it"
            )
        if level.name != name:
            raise ValueError(f"node {name!r} holds the level {level.name!r}; give both one name")
    if len(graph) < 2:
        raise ValueError(f"`graph` has {len(graph)} nodes; add at least two levels and an edge")
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [source for source, _ in nx.find_cycle(graph)]
        raise StructureError(
            f"the levels go round in a circle: {_arrow(*cycle, cycle[0])}. Each would have to be "
            "solved before the other; remove one of these edges (the solution of a level below is "
            "seen above without an edge)"
        )
    tops = [name for name, degree in graph.in_degree() if degree == 0]
    if len(tops) > 1:
        raise StructureError(
            f"no edge leads to {' or '.join(repr(one) for one in tops)}, but a problem has one "
            "top, whose variable is given: add the missing edge to what depends on a level above, "
            "or join them to one level"
        )
    for name in graph:
        level = graph.nodes[name]["level"]
        if name == tops[0]:
            level.require_given()
        else:
            level.require_solver()
        if level.has_tasks and graph.out_degree(name):
            raise StructureError(
                f"level {name!r} has many tasks, and an edge leads from it to a level below, which "
                "would be another one for each task; write the two as one level of many tasks "
                "with an `argmin` in its objective"
            )


def top_of(graph: nx.DiGraph) -> str:
    """The name of the level whose variable is given."""
    return next(str(name) for name, degree in graph.in_degree() if degree == 0)


@dataclass(frozen=True)
class LevelPlan:
    """What the graph says of each level, worked out once: solves ask for it again and again.

    Attributes:
        graph: The levels.
        needs: The variables from above that the solution is a function of, in solving order.
        below: The levels that its variable reaches.
        together: The levels that are solved in one call with it, itself included.
    """

    graph: nx.DiGraph
    needs: dict[str, list[str]]
    below: dict[str, set[str]]
    together: dict[str, list[str]]

    @classmethod
    def of(cls, graph: nx.DiGraph) -> LevelPlan:
        """Read a graph that was checked."""
        given = {name: needs(graph, name) for name in graph}
        inside = {name: below(graph, name) for name in graph}

        level: dict[str, Level] = dict(graph.nodes(data="level"))
        # Those that can be tasks beside others.
        single = [name for name in graph if not (inside[name] or level[name].has_tasks)]

        def group(name: str) -> list[str]:
            if name not in single:
                return [name]
            return [
                other
                for other in single
                if given[other] == given[name] and level[other].alike(level[name])
            ]

        return cls(graph, given, inside, {name: group(name) for name in graph})

    def level(self, name: str) -> Level:
        """The level of that name."""
        found: Level = self.graph.nodes[name]["level"]
        return found


def needs(graph: nx.DiGraph, name: str) -> list[str]:
    """The variables from above that the solution of a level is a function of, in solving order.

    Its own, and those that enter the levels below it, which are solved inside its objective. What a
    level below needs from beside this one cannot be given, and is refused where it is read.
    """
    import networkx as nx

    inside = {name, *nx.descendants(graph, name)}
    found = {parent for one in inside for parent in graph.predecessors(one)}
    found &= nx.ancestors(graph, name)
    return [one for one in order(graph) if one in found]


def routes(graph: nx.DiGraph, name: str, most: int | None = None) -> list[list[str]]:
    """The paths by which the top's variable reaches a level: the routes of its hypergradient.

    With ``most``, the first so many.
    """
    import networkx as nx

    top = top_of(graph)
    if name == top:
        return [[top]]
    return [list(one) for one in islice(nx.all_simple_paths(graph, top, name), most)]


def order(graph: nx.DiGraph) -> list[str]:
    """The levels, none before one that enters it."""
    import networkx as nx

    return list(nx.topological_sort(graph))


def generations(graph: nx.DiGraph) -> list[list[str]]:
    """The levels from the top down; those of one generation do not enter each other."""
    import networkx as nx

    return [list(one) for one in nx.topological_generations(graph)]


def below(graph: nx.DiGraph, name: str) -> set[str]:
    """The levels that the variable of this one reaches."""
    import networkx as nx

    return set(nx.descendants(graph, name))


def _arrow(*names: Hashable) -> str:
    return " → ".join(str(name) for name in names)


def listed(names: Iterable[Hashable]) -> str:
    """Names, quoted."""
    return ", ".join(repr(name) for name in names)
