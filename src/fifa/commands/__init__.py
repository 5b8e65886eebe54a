"""Groups of commands; each imports what it does when it does it."""
