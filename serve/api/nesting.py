"""How deep a value may be whose shape nobody prescribes: templates, logs and libraries walk it by recursion."""

from collections.abc import Mapping
from typing import Any

from serve.api.errors import invalid

MAX_LEVELS = 64  # of lists and objects in one another


def check_levels(fields: Mapping[str, Any], where: str = "") -> None:
    """Looks at the values of fields.

    Args:
        where: stands before their names in `param`.

    Raises:
        APIError: 400 that names a field.
    """
    for name, value in fields.items():
        if _has_more(value):
            param = where + name[:100]
            raise invalid(param, f"`{param}` holds more than {MAX_LEVELS} lists or objects in one another.")


def _has_more(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_LEVELS + 1):
        containers = [each for each in level if isinstance(each, dict | list)]
        if not containers:
            return False
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
    return True
