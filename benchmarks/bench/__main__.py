"""``python -m benchmarks.bench``, from the repository's root: speed and memory beside other programs."""

from __future__ import annotations

import argparse
import sys

from benchmarks.bench.run import run_bench
from benchmarks.bench.settings import add_bench_arguments, request_of
from nanokimi.console import complain
from nanokimi.errors import RunError, UserError


def main() -> int:
    """Runs the bench; returns its exit code, as commands of ``nanokimi`` do."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__, allow_abbrev=False)
    add_bench_arguments(parser)
    try:
        return run_bench(request_of(parser.parse_args()))
    except (UserError, RunError) as error:
        complain(f"bench: {error}")
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
