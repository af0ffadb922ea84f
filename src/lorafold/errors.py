"""Errors that the user can put right. The command prints such a message without a traceback and
exits with code 2.
"""


class LorafoldError(Exception):
    """A request that can't be carried out. The message names the file, row, field or site, what was
    found, what was expected, and what to do.
    """


class NotMergeable(LorafoldError):
    """A delta without a form in weight space, or a weight that can't store the changed values."""


class NoTokenizer(LorafoldError):
    """A model or adapter directory without the vocabulary of a tokenizer."""


class Interrupted(Exception):
    """A run stopped because a signal asked it to.

    `code` is the shell's exit code for the signal; the message says how to continue the run.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
