"""Files that are there whole or not at all."""

import contextlib
import glob
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

# Seconds after which nobody is taken to be writing a draft any more
_FORGOTTEN = 24 * 60 * 60


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Write a file: an older one is replaced only once the new one is whole, and nothing is left of one that fails. A link in
    the file's place is replaced, not followed. Of several writers at once the last to end counts. What a kill leaves is removed
    by the first writer a day later.

    Args:
        path: file to write; its folder is made.

    Yields:
        Where to write to inside the context.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")  # of this writer alone
    _sweep(path)
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Drafts of the file that a kill left."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*draft"):
        with contextlib.suppress(OSError):  # another writer was faster
            if time.time() - old.lstat().st_mtime > _FORGOTTEN:
                old.unlink()
