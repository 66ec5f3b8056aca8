"""Where ``torch.save`` puts the bytes of a tensor: the record ``data/0`` of a zip archive, not compressed.

Reading them there costs no copy of the item and unpickles nothing. The end of an archive says where its directory
begins, the directory has an entry for each record, and before a record's bytes stands a header of its own.
"""

from __future__ import annotations

import struct
import sys

_END = struct.Struct("<4s6xH4xI2x")  # records, where the directory begins
_ENTRY = struct.Struct("<4s6xH12xIHHH8xI")  # method, nbytes, of name, of what is added, of a comment, where it begins
_HEADER = struct.Struct("<4s22xHH")  # nbytes of the name, of what is added


def tensor_bytes(archive: memoryview, nbytes: int) -> memoryview | None:
    """Return the bytes of the one tensor in an archive, or None where they do not lie there as they are needed.

    Args:
        archive: all of what ``torch.save`` wrote of a 1-D tensor.
        nbytes: of the tensor.
    """
    found: dict[str, memoryview] = {}
    try:
        mark, count, place = _END.unpack_from(archive, len(archive) - _END.size)
        if mark != b"PK\5\6":
            return None
        for _ in range(count):
            mark, method, size, name_size, added, comment, begin = _ENTRY.unpack_from(archive, place)
            name = bytes(archive[place + _ENTRY.size :][:name_size]).decode()
            place += _ENTRY.size + name_size + added + comment
            head, *lengths = _HEADER.unpack_from(archive, begin)
            if mark != b"PK\1\2" or head != b"PK\3\4" or method:
                return None
            found[name.partition("/")[2]] = archive[begin + _HEADER.size + sum(lengths) :][:size]
    except (struct.error, UnicodeDecodeError):
        return None
    data = found.get("data/0")
    in_order = bytes(found.get("byteorder", b"")) == sys.byteorder.encode()
    return data if in_order and data is not None and len(data) == nbytes else None
