"""python run.py [COMMAND] --experiment NAME [--field value ...]; python run.py --help."""

import sys

from spmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
