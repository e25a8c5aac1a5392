"""`python -m lightning_methods` is the command `lightning-methods`."""

from __future__ import annotations

import sys

from lightning_methods.cli import main

if __name__ == "__main__":
    sys.exit(main())
