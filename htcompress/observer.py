"""How long-running work tells where it stands, without knowing who listens."""

from __future__ import annotations


class Observer:
    """Does nothing; the command line's draws progress bars and prints messages."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins; `total` units of work where they are known."""

    def advance(self, done: int, detail: str = "") -> None:
        """So many units of the present stage are done."""

    def message(self, text: str) -> None:
        """Something the user should know, and that is no error."""
