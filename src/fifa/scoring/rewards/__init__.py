"""The reward models that margin and evaluation share, and the training of a proxy."""
