"""A model file that ends the process: an error that names its line, where the process is somebody else's.

    def forward(self, x):
        sys.exit(0)            # exit code 0 would say that nothing differs

A `SystemExit` is no `Exception`, so it goes through everything that runs the user's code; at the doors of this package
(`load_subject`, `export_subject`, `assert_equivalent`, the command line) it becomes an error like any other. What ends
the process without an exception (`os._exit`, a signal) is told by `moe_export.supervisor`, on the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_export.errors import UsageError


@contextmanager
def no_exit() -> Iterator[None]:
    """Where the user's code runs.

    Raises:
        UsageError: That code ended the process.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # so does rich where nobody reads its output
            raise error.__context__ from None
        from moe_export.export.frontend.source import last_user_line

        code = "" if error.code is None else repr(error.code)
        raise UsageError(
            f"the model's code ended the process: sys.exit({code})",
            where=last_user_line(error),
            hint="let it raise an exception: what ends early can be neither exported nor compared",
        ) from error
