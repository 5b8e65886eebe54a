"""The run folder, and what each command does to it."""
