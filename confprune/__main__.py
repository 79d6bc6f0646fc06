"""``python -m confprune``: the command line."""

import sys

from confprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
