"""SELECT: the importance of every pair, what is kept, and the reason for each."""

from fifa.select.choose import select
from fifa.select.table import SELECTION, reason_counts

__all__ = ["SELECTION", "reason_counts", "select"]
