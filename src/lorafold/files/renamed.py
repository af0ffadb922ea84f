"""Fields of recipes that have another name now. Files are read under the old names for good."""

from collections.abc import Mapping
from typing import Any

RENAMED = {"base": "storage"}


def named_as_now(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that any version wrote, under the names that they have now."""
    return {RENAMED.get(name, name): value for name, value in recipe.items()}
