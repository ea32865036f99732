"""``python verify_muon.py``: a readable proof that the optimizer does what it says; exit code 0 only for PASS."""

import sys

from nanokimi.insight.verify_muon import main

if __name__ == "__main__":
    sys.exit(main())
