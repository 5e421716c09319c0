"""How every file is written: to a temporary name beside it, synced to the disk, renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from model.cli import first_line


@contextmanager
def open_atomically(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write; a reader, even after a crash, finds the old content of `path` or all of the new.

    `shared`: other processes may write the same file now. Else the temporary name is fixed, so that the next write
    replaces what a killed process left. Raises OSError naming the file and the reason where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{f'.{secrets.token_hex(4)}' * shared}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else first_line(error)
        raise OSError(None, f"{path}: not saved: {reason}; what was saved before is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, shared: bool = False) -> None:
    """Write text or bytes, see `open_atomically`."""
    with open_atomically(path, shared) as file:
        file.write(content.encode() if isinstance(content, str) else content)
