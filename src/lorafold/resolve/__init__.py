"""Resolves the names of base models: internal code uses a `Base` and no names."""

from lorafold.resolve.base import Base as Base
from lorafold.resolve.base import base_for as base_for
