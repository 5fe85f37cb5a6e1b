"""python -m spmd.cli: the command line of an installed package, as run.py is that of a checkout."""

import sys

from spmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
