"""What a thing is, as one digest: a model, an adapter, a stack of them, the code that makes it."""

from lorafold.identity.code import COMPUTED_WITH, TRAINING, of_code
from lorafold.identity.things import joined, of_adapter, of_model, of_stack

__all__ = ["COMPUTED_WITH", "TRAINING", "joined", "of_adapter", "of_code", "of_model", "of_stack"]
