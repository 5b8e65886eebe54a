"""Atomic files and the ledger: kill any step anywhere, run it again, get the same bytes."""
