"""``python -m penjing`` is ``penjing``."""

from .cli import main

main()
