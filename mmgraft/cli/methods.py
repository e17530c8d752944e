"""``mmgraft methods``."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from mmgraft.cli.console import note, print_json, stdout, table
from mmgraft.cli.options import JsonFlag

if TYPE_CHECKING:
    from mmgraft.grafts.method import Method


_LEGEND = (
    "text kept, bit for bit: E0 in a batch of text, E1 beside rows with an image, E2 before an "
    "image in its row, E3 by a graft that is not trained yet"
)


def methods(json: JsonFlag = False) -> None:
    """List the methods and the projectors: those built in, and those of installed packages."""
    from mmgraft.grafts.registry import broken_methods
    from mmgraft.grafts.registry import methods as usable_methods
    from mmgraft.vision.projectors.registry import PROJECTORS
    from mmgraft.vision.towers.registry import TOWERS

    usable, projectors = usable_methods().values(), PROJECTORS.all()
    broken = [*broken_methods(), *projectors[1], *TOWERS.all()[1]]
    titles = {name: kind.title for name, kind in projectors[0].items()}
    if json:
        rows = [
            {
                "name": method.name,
                "title": method.title,
                "paper": method.paper,
                "from": method.origin,
                "levels": method.levels(),
                "settings": method.config_class.model_json_schema()["properties"],
            }
            for method in usable
        ]
        broken_too = [asdict(one) for one in broken]
        print_json({"methods": rows, "broken": broken_too, "projectors": titles})
        return
    stdout().print(
        table(
            ["method", "what it adds", "text kept", "paper", "from"],
            [[m.name, m.title, _kept(m), m.paper, m.origin] for m in usable],
        )
    )
    note(_LEGEND)
    stdout().print(table(["projector", "what it computes"], list(map(list, titles.items()))))
    for one in broken:
        note(f"{one.what} {one.name!r} of the package {one.origin!r} cannot be used: {one.reason}")


def _kept(method: "Method") -> str:
    """Return ``E0 E1 E3 (structure a, b)``: levels, with the settings that some need."""
    shown = []
    for level, settings in method.levels().items():
        pairs = [one.split(": ") for one in settings]
        needs = [f"{name} {', '.join(v for n, v in pairs if n == name)}" for name in dict(pairs)]
        shown.append(f"{level} ({'; '.join(needs)})" if needs else level)
    return " ".join(shown)
