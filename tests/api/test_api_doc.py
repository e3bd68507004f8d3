"""docs/api.md agrees with the code."""

import pytest

from tools.docs.api_tables import PAGE, rewritten


def test_api_tables_are_current() -> None:
    """`python -m tools.docs.api_tables` writes them."""
    page = PAGE.read_text("utf-8")
    assert rewritten(page) == page


@pytest.mark.parametrize(
    ("present", "wrong"),
    [
        ("| `n` | integer, 1 to 128 |", "| `n` | integer, 1 to 127 |"),
        ("| `engine_error` | 500 |", "| `engine_error` | 503 |"),
        ("| `GET /ping` | ", "| `GET /pong` | "),
    ],
)
def test_api_tables_correct_a_generated_cell(present: str, wrong: str) -> None:
    page = PAGE.read_text("utf-8")
    assert present in page
    assert rewritten(page.replace(present, wrong)) == page


@pytest.mark.parametrize("row", ["| `seed` |", "| `too_many_bodies` |"])
def test_api_tables_require_a_description(row: str) -> None:
    page = PAGE.read_text("utf-8").splitlines(keepends=True)
    without = "".join(line for line in page if not line.startswith(row))
    with pytest.raises(ValueError, match=row.split("`")[1]):
        rewritten(without)
