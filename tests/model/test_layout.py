"""Sizes that Python and the C++ kernels share are defined once, in model/layout.py."""

import re

import pytest

from model import kv_cache, layout
from model.kernels.cpu import library

SOURCES = {path.name: path.read_text() for path in (*library.UNITS, *library.HEADERS)}
SHARED = {"PAGE_SIZE": "kPage", "COLUMN_BLOCK": "kColumns"}


@pytest.mark.parametrize("name", SHARED)
def test_layout_is_passed_to_the_compiler(name: str) -> None:
    assert f"-DLOGPROBD_{name}={getattr(layout, name)}" in library.FLAGS


@pytest.mark.parametrize("name", SHARED)
def test_layout_constants_have_no_value_in_cpp(name: str) -> None:
    definition = re.compile(rf"\bint64_t {SHARED[name]} = (.+?);")
    definitions = {source: definition.findall(text) for source, text in SOURCES.items()}
    assert {source: values for source, values in definitions.items() if values} == {"layout.h": [f"LOGPROBD_{name}"]}


def test_layout_sizes_are_the_ones_in_use() -> None:
    assert kv_cache.PAGE_SIZE == layout.PAGE_SIZE
    assert set(SHARED) == {name for name in vars(layout) if name.isupper()}
