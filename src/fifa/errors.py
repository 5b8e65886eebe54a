"""The one exception that a person is meant to read."""

from __future__ import annotations


class FifaError(Exception):
    """Something a person can mend: what is wrong, where, and what to do.

    Parameters
    ----------
    what
        What is wrong, in one sentence without a full stop.
    where
        File, row, column or URL, if one is to blame.
    do
        What to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        self.what, self.where, self.do = (
            _printable(what),
            where and _printable(where),
            do and _printable(do),
        )
        super().__init__(self.__str__())

    def __str__(self) -> str:
        """All three parts, a line each."""
        parts = [self.what]
        if self.where:
            parts.append(f"  where: {self.where}")
        if self.do:
            parts.append(f"  do:    {self.do}")
        return "\n".join(parts)


def brief(error: BaseException) -> str:
    """What another library says of an error: one line, at most 300 characters.

    Its class where it says nothing.
    """
    return " ".join(str(error).split())[:300] or type(error).__name__


def _printable(text: str) -> str:
    """The text, lone surrogates (from a file's name, or from JSON) as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()
