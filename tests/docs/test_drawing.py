"""docs/rooms.svg draws the imports that there are: each follows the arrows, and each arrow is one."""

import re

from tests.test_imports import MODULES, ROOT, imports

ARROWS = set(
    re.findall(r'data-from="([\w.]+)" data-to="([\w.]+)"', (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8"))
)
DRAWN = {room for arrow in ARROWS for room in arrow}


def room_of(module: str) -> str | None:
    """The innermost drawn room of a module; None of one that is not in the drawing, as retro.provenance."""
    if module == "retro.evaluation.scorer":  # a room below those that read with it
        return "scorer"
    names = module.split(".")[1:3]
    return next((room for room in (".".join(names), *names[:1]) if room in DRAWN), None)


def reached(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """What can be reached by arrows, through rooms inside of others too."""
    found = set(arrows)
    while True:
        further = {(a, d) for a, b in found for c, d in found if b == c and a != d} - found
        if not further:
            return found
        found |= further


def test_the_drawing_of_the_rooms_is_true():
    files = [*MODULES.items(), *(("retro.train", path) for path in (ROOT / "train").glob("*.py"))]
    pairs = {(room_of(name), room_of(other)) for name, path in files for other in imports(path)}
    real = {(a, b) for a, b in pairs if a and b and a != b}
    outside = {(a, b) for a, b in real if "." not in a + b}
    inside = {(a, b) for a, b in real if "." in a and "." in b}
    assert outside <= reached({arrow for arrow in ARROWS if "." not in "".join(arrow)})
    assert inside <= reached({arrow for arrow in ARROWS if "." in arrow[0]})
    through = {(a.split(".")[0], b.split(".")[0]) for a, b in real}
    assert through - {("retrieval", "retrieval")} | inside >= ARROWS
