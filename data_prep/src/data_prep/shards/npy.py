"""Tables as numpy's .npy files: one array of records, mapped, so that all processes of a machine share its pages.

numpy is imported by the functions: the commands' `--help` imports this package.
"""

from __future__ import annotations

import io
import mmap
import os
from io import FileIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Mapped = mmap.mmap | bytes
"""The content of a file; nothing can be mapped of an empty one."""

_HEADER = 1 << 14  # bytes of a file that hold its header; numpy refuses longer ones


def mapped(file: FileIO) -> Mapped:
    """The content of an open file, which may be closed then. OSError if the system cannot map it."""
    if not os.fstat(file.fileno()).st_size:
        return b""
    # Private, though nothing is written: some file systems refuse shared mappings, and pages are shared all the same.
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def packed(table: np.ndarray) -> bytes:
    """A table as a .npy file of format 1.0; equal tables give equal bytes."""
    import numpy as np

    file = io.BytesIO()
    np.lib.format.write_array(file, table, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def table_in(raw: Mapped) -> np.ndarray:
    """The table in a .npy file, without a copy; what its fields are is not checked.

    Raises:
        ValueError: it is no .npy file of records, cut short, or goes on after them.
    """
    import numpy as np

    head = io.BytesIO(raw[:_HEADER])
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("not of .npy's format 1.0")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(head)
    except Exception as error:  # whatever numpy's reader raises for a foreign header
        raise ValueError(f"no .npy file: {str(error)[:200]}") from error
    if len(shape) != 1 or columns_first or dtype.names is None or dtype.hasobject:
        raise ValueError("no table of records")
    size = head.tell() + shape[0] * dtype.itemsize
    if size != len(raw):
        raise ValueError(f"has {len(raw):,} bytes, its header says {size:,}")
    return np.ndarray(shape, dtype, buffer=raw, offset=head.tell())
