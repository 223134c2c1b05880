"""`python -m tokencut`: the same as the `tokencut` command."""

import sys

from tokencut.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
