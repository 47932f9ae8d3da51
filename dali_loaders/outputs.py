"""Where a command writes. Whether that is possible is found out before the work, which may take hours."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress

from dali_loaders.names import quoted

# Endings of files. A folder of such a name would be taken for one.
OF_FILES = {
    ".7z", ".bin", ".bz2", ".ckpt", ".csv", ".gz", ".idx", ".jpeg", ".jpg", ".json", ".npy", ".npz", ".onnx", ".parquet", ".pdf", ".png",
    ".pt", ".pth", ".py", ".rar", ".rec", ".safetensors", ".tar", ".tgz", ".txt", ".xz", ".yaml", ".zip", ".zst",
}  # fmt: skip


def check_file(path: str, what: str, *endings: str, makes_folder: bool = False) -> None:
    """ValueError, with `what` as its subject, where no file of the name `path` can be written: it has none of the endings (any, if none are
    given), it is a folder, or the folder that it goes into is missing (unless `makes_folder`: the writer makes it) or refuses a new file.
    Nothing is left of the attempt."""
    if not path:
        raise ValueError(f"{what} has no name: give it one{_such_as(endings)}.")
    if endings and not path.lower().endswith(endings):
        raise ValueError(f"{what} would be named {quoted(path)}; give it a name that ends in {' or '.join(endings)}.")
    reason = _reason(path, makes_folder)
    if reason:
        raise ValueError(f"{what} cannot be written to {quoted(path)} ({reason}): choose another place.")


def check_folder(path: str, what: str) -> None:
    """ValueError for a folder to come whose name is that of a file. One that is there, or ends in "/", is meant."""
    if os.path.splitext(path)[1].lower() in OF_FILES and not os.path.isdir(path):
        raise ValueError(
            f"{what} is a folder, but {quoted(path)} is the name of a file: choose another, or write {quoted(path + '/')} if you mean it."
        )


def _such_as(endings: tuple[str, ...]) -> str:
    return f" that ends in {' or '.join(endings)}" if endings else ""


def _reason(path: str, makes_folder: bool) -> str | None:
    """Why a file cannot be written; None if it can. Permissions say too little: of a read-only mount, of /proc, to root."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with suppress(FileNotFoundError):
            kind = os.stat(path).st_mode  # an error, where the name is too long
            if not stat.S_ISREG(kind):
                return "it is a folder" if stat.S_ISDIR(kind) else "it is no regular file"
            os.close(os.open(path, os.O_WRONLY))
        while makes_folder and not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except FileNotFoundError:
        return "no file can be made there" if os.path.isdir(folder) else f"there is no folder {quoted(folder)}"
    except NotADirectoryError:
        return f"{quoted(folder)} is no folder"
    except OSError as error:
        return error.strerror or str(error)
