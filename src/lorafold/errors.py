"""What goes wrong because of what was asked or given: the command prints the message as it is and
exits with 2.
"""


class LorafoldError(Exception):
    """A request that can't be carried out.

    The message names the place (file, row, field, site), what was found and what was expected.
    """


class NotMergeable(LorafoldError):
    """A change with no form in weight space, or a weight it can't be written into."""


class NoTokenizer(LorafoldError):
    """A directory without a vocabulary, where a tokenizer was looked for."""


class Interrupted(Exception):
    """A run that was asked to stop, and has.

    `code` is the shell's exit code for the signal; the message says how to go on.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
