"""``python train.py ...`` is ``nanokimi train ...``."""

import sys

from nanokimi.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
