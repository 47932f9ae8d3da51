"""Reads records with the mxnet package itself: for users who want its reader, and as the reference that the tests compare with."""

import os
import threading
from typing import Any

import numpy as np

from dali_loaders.account import ReadError
from dali_loaders.recordio.records import index_path


class MXNetReader:
    """The same records, read by the mxnet package. It needs PATH.idx and reads one record at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        recordio = import_recordio()
        if not os.path.exists(index_path(path)):
            raise ValueError(f"reader='mxnet' needs {index_path(path)}, which does not exist and cannot be written; use reader='native'.")
        self._records = recordio.MXIndexedRecordIO(index_path(path), path, "r")

    def read(self, key: int) -> bytes:
        """ReadError, in mxnet's words, where it cannot read the record."""
        try:
            with self._lock:
                record = self._records.read_idx(key)
        except Exception as error:  # MXNetError, which only mxnet could name
            raise ReadError(str(error).strip().split("\n")[0]) from error
        if record is None:
            raise ReadError("no record")
        return record

    def __reduce__(self) -> tuple:
        return MXNetReader, (self.path,)


def import_recordio() -> Any:
    """mxnet.recordio; ValueError if mxnet cannot be imported."""
    had_bool = "bool" in vars(np)
    vars(np).setdefault("bool", bool)  # mxnet 1.9.1 uses the name that numpy 1.24 removed
    try:
        from mxnet import recordio
    except Exception as error:
        raise ValueError(
            f"reader='mxnet' needs the mxnet package, which cannot be imported here ({error}); "
            "install the extra with pip install 'protoshard[mxnet]', or use reader='native'."
        ) from error
    finally:
        if not had_bool:
            del vars(np)["bool"]
    return recordio
