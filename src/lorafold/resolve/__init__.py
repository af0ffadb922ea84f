"""What a user names, found once: below the door a `Base` travels, and no name.

    base = Base("smollm2", storage="nf4")
    base.identity     base.loaded_as     base.tokenizer([saved])     base.weights()
    base_for(None, [saved])     the base that an adapter says it was trained on
"""

from lorafold.resolve.base import Base as Base
from lorafold.resolve.base import base_for as base_for
