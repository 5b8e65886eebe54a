"""SELECT: the importance of every pair, what is kept, and the reason for each."""
