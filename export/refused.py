"""`RefusedError`: why something that was looked at is left as it was written."""

from __future__ import annotations


class RefusedError(Exception):
    """Something was recognised up to a point, and is not what it looked like.

    Who catches it leaves the model as it was and says so in a note; a user sees it as an error only where the form was
    insisted on.

    Attributes:
        reason: In words that follow a colon.
        where: `file:line` of the model, if that is known.
    """

    def __init__(self, reason: str, where: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where
