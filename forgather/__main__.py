"""`python -m forgather`, which is also what torchrun starts on every rank."""

import sys

from forgather.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
