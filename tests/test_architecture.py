"""What may import what, read off the imports, so that the README's map of the source stays true.

Run as a script, this prints the floors: every part stands above all that it imports.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fcvgg"

GROUND = ("errors", "names", "choices", "geometry", "categories", "probability")

RULES = {
    **dict.fromkeys(GROUND, ("only", GROUND)),
    "categories": ("only", (*GROUND, "support.untrusted")),  # names are read from files too
    "support": ("only", (*GROUND, "support")),
    "images": ("only", (*GROUND, "support", "images")),
    "rewriting": ("only", (*GROUND, "support.module_state", "rewriting")),
    "viewer": ("only", (*GROUND, "support", "viewer")),
    "results": ("only", (*GROUND, "support", "images", "viewer", "results")),
    "network": ("not", ("verification", "conversion")),
    "streaming": ("not", ("sources", "loading")),
    "optimization": ("not", ("sources", "loading")),
    "": ("not", ("cli",)),
}
"""What each part may import of the package: only these, or all but these.

The empty name stands for every part but the command line and ``python -m fcvgg``.
"""

ROOMS = 30
"""The most modules and folders that the top two levels may have."""


def module_of(path: Path) -> str:
    """The name of a source file within the package; the package's own is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(path: Path) -> ast.AST:
    """A source file, with the names that it loads lazily, which a stub next to it lists."""
    stub = path.with_suffix(".pyi")
    return ast.parse(path.read_text() + (stub.read_text() if stub.is_file() else ""))


MODULES = {module_of(path): parsed(path) for path in PACKAGE.rglob("*.py")}


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run, those in functions too; not those for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from statements(other)
        else:
            yield from statements(node)


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for node in statements(MODULES[name]):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # in a stub, which stands in the package's folder
                module = ".".join(part for part in ("fcvgg", name, module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
            names = [full if full.removeprefix("fcvgg.") in MODULES else module for full in names]
        else:
            names = [alias.name for alias in node.names]
        found.update(n.removeprefix("fcvgg").lstrip(".") for n in names if is_own(n))
    return found - {name}


def is_own(name: str) -> bool:
    return name == "fcvgg" or name.startswith("fcvgg.")


def within(module: str, parts: Iterable[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of two or more nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for node in arrows[waiting.pop()] - seen:
                seen.add(node)
                waiting.append(node)
        return seen

    reach = {node: reached(node) for node in arrows}
    found = {
        tuple(sorted({node, *(other for other in reach[node] if node in reach[other])}))
        for node in arrows
    }
    return [list(circle) for circle in sorted(found) if len(circle) > 1]


def floors(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """The nodes in layers, each above all that it has an arrow to; a circle is one layer."""
    together = {node: frozenset(circle) for circle in circles(arrows) for node in circle}
    floor: dict[str, int] = {}

    def floor_of(node: str) -> int:
        if node not in floor:
            ring = together.get(node, frozenset({node}))
            below = set().union(*(arrows[one] for one in ring)) - ring
            height = 1 + max(map(floor_of, below), default=0)
            floor.update(dict.fromkeys(ring, height))
        return floor[node]

    for node in arrows:
        floor_of(node)
    return [
        sorted(node for node in arrows if floor[node] == height)
        for height in range(1, max(floor.values()) + 1)
    ]


def arrows_between(room: Callable[[str], str]) -> dict[str, set[str]]:
    """The imports between rooms, given the room of every module."""
    found: dict[str, set[str]] = {room(name): set() for name in MODULES if room(name)}
    for name in MODULES:
        if room(name):
            others = {room(other) for other in imports(name)}
            found[room(name)] |= others - {"", room(name)}
    return found


def room_of(module: str) -> str:
    """The module or folder of the top two levels that a module is in."""
    parts = module.split(".")
    if parts[0] == "__main__":
        return ""
    depth = 2 if len(parts) > 1 and (PACKAGE / parts[0] / parts[1]).is_dir() else 1
    return ".".join(parts[:depth])


@pytest.mark.parametrize("part", RULES)
def test_parts_import_only_what_they_may(part: str) -> None:
    kind, others = RULES[part]
    for name in MODULES:
        if within(name, [part]) if part else not within(name, ["cli", "__main__"]):
            for other in imports(name):
                assert within(other, others) == (kind == "only"), f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Those within functions count too: they would only hide a circle."""
    arrows = {name: imports(name) - {""} for name in MODULES if name}
    assert not circles(arrows)


def test_the_top_two_levels_can_be_taken_in() -> None:
    rooms = {room_of(name) for name in MODULES} - {""}
    assert len(rooms) <= ROOMS


def main() -> None:
    rooms = arrows_between(room_of)
    count = sum(map(len, rooms.values()))
    print(f"{len(rooms)} rooms on the top two levels, {count} arrows, {len(floors(rooms))} floors")
    for height, names in reversed(list(enumerate(floors(rooms), 1))):
        print(f"{height:3}  {', '.join(names)}")
    for circle in circles(rooms):
        print(f"circle of rooms: {', '.join(circle)}")
    modules = {name: imports(name) - {""} for name in MODULES if name}
    for circle in circles(modules):
        print(f"circle of modules: {', '.join(circle)}")


if __name__ == "__main__":
    main()
