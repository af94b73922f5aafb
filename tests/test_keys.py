"""docs/keys.md, held to the code that takes the keys."""

import re
from typing import Any, get_args

from sweep.planning.keys import PAGE, SECTIONS, UNITS, anchor, page
from sweep.planning.loading import FILE, Named


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == page(), "python -m sweep.planning.keys writes it anew"


def test_every_key_that_a_file_may_have_has_a_row_with_its_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(?:[^|]|\\\|)+\|[^|]*\|[^|]*\| \S.+ \|$", page(), re.MULTILINE)
    assert sorted(rows) == sorted(key for section in SECTIONS for key in section.keys)
    mappings = [kind for kind in _mappings(FILE) if kind != FILE["models"].of["variants"].of]
    assert all(kind in [section.keys for section in SECTIONS] for kind in mappings)


def _mappings(kind: Any) -> list[dict[str, Any]]:
    """Every mapping of fixed keys in the schema, but for those that only gather others."""
    if isinstance(kind, Named):
        return _mappings(kind.of)
    if not isinstance(kind, dict):
        return []
    own = [] if kind is FILE["defaults"] else [kind]
    return own + [inner for item in kind.values() for inner in _mappings(item)]


def test_every_number_has_a_unit() -> None:
    numbers = {
        key
        for section in SECTIONS
        if section.title != "Seeds"
        for key, kind in section.keys.items()
        if any(arm in (int, float) for arm in (kind, *get_args(kind)))
    }
    assert numbers == UNITS.keys()


def test_every_link_leads_to_a_section() -> None:
    linked = set(re.findall(r"\]\(#([\w-]+)\)", page()))
    assert linked <= {anchor(title) for title in re.findall(r"^## (.+)$", page(), re.MULTILINE)}
    assert {"a-model", "a-task", "wb"} <= linked
