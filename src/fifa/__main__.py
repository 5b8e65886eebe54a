"""``python -m fifa`` is ``fifa``."""

from fifa.cli import main

main()
