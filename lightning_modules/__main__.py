"""``python -m lightning_modules`` is the ``nsgd`` command."""

import sys

from lightning_modules.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
