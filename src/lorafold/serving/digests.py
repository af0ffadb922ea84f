"""Which digests stand for which version.

    digests.fit(found, "5fdad78c")      whether these are the first digits of the version's digest

In the old form a version's digest is that of its configuration, its weights, its record and its
manifest, without the tokenizer and the adapters below. Clients, aliases and quarantines that have
one are understood until lorafold 0.3, and the log says what to use instead; what such a digest
leaves out, it does not pin.

Without a manifest the old form is that which a version without a tokenizer has today. What it pins
is not known then, so that it stands for nothing else, which the log says too; a quarantine holds.
"""

from __future__ import annotations

import logging

from lorafold.serving.seen import Found

log = logging.getLogger(__name__)
SHOWN = 12  # digits in a line of the log
WON_T = "which lorafold 0.3 won't understand"
MAY_BE = "or of another version without a tokenizer, so that it stands for nothing now"


class Digests:
    """Compares digests with those of one server's versions. Any thread may call it."""

    def __init__(self) -> None:
        self._told: set[str] = set()  # versions of which it was said

    def fit(self, found: Found, given: str, unsure: bool = False) -> bool:
        """Whether a digest, or the first digits of one, is that of a version, in either form.

        Args:
            given: the digits, as a client or the file of what is kept has them.
            unsure: what it is where it may be another version's.
        """
        if found.digest.startswith(given):
            return True
        if not found.old.startswith(given):
            return False
        if found.key not in self._told:
            self._told.add(found.key)
            log.warning(
                "%s@%s is a digest of the old form, %s; use %s",
                found.name, given[:SHOWN], WON_T if found.manifest else MAY_BE, found.key,
            )  # fmt: skip
        return found.manifest or unsure
