"""Resolution of base model names to a `Base`. Internal code accepts a `Base`, never a name."""

from lorafold.resolve.base import Base as Base
from lorafold.resolve.base import base_for as base_for
