"""Mistakes a user can make end in one line that says what, where and how to mend it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's: one line, exit status 2."""


def run_main(main: Callable[[], None]) -> None:
    """Run a program's `main`, turning what users can cause into one line and an exit status.

    2: UserError. 1: what is not the user's (disk full, out of memory). 130: interrupted.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
