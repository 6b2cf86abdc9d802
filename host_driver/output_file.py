"""Files that a run leaves behind: checked before it, written whole or not at all after it."""

import os
import tempfile
from pathlib import Path

from host_driver.errors import InvalidRequest


def check_writable(file: Path) -> None:
    """Raises InvalidRequest now rather than after a long run."""
    folder = file.resolve().parent
    if not folder.is_dir():
        raise InvalidRequest(f"{file}: the folder {folder} does not exist")
    if file.is_dir():
        raise InvalidRequest(f"{file}: this is a folder")
    if not os.access(folder, os.W_OK):
        raise InvalidRequest(f"{file}: the folder {folder} cannot be written")


def write_whole(contents: str | bytes, file: Path) -> None:
    """Writes a file whole or not at all."""
    try:
        handle, temporary = tempfile.mkstemp(dir=file.resolve().parent, prefix=f".{file.name}.")
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(contents.encode() if isinstance(contents, str) else contents)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, file)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise InvalidRequest(f"{file}: {error.strerror or error}") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
