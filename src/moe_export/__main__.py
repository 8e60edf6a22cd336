"""`moe-export` and `python -m moe_export`: the work is done in a child of this process (see `supervisor`)."""

from __future__ import annotations

import sys

from moe_export.supervisor import supervise


def main() -> int:
    """Run the command line and return its exit code."""
    return supervise(_work)


def _work() -> int:
    from moe_export.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
