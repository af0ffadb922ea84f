"""What a user names, found once: below the door a `Base` travels, and no name.

    base = Base("smollm2", storage="nf4")
    base.identity     base.held     base.tokenizer([saved])     base.weights()
"""

from lorafold.opening.base import Base as Base
