"""``python inference.py CHECKPOINT ...`` is ``nanokimi generate CHECKPOINT ...``."""

import sys

from nanokimi.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
