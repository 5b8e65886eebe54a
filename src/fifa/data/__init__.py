"""READ: any feedback data set becomes one table of preference pairs, without reading pixels."""

from fifa.data.read import read_pairs

__all__ = ["read_pairs"]
