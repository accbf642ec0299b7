"""Zeroes the GPU code of a shared library that one GPU does not need, so that it packs small.

python benchmarks/vllm_strip_fatbin.py library.so stripped.so 90

The file keeps its size and addresses: only payloads of other architectures, and all PTX, become
zeros, which the CUDA driver never looks at where code for its own architecture is there.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

MAGIC = 0xBA55ED50
CODE = 2
"""Kind of an entry that holds machine code; 1 is PTX."""


def sections(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, place and size of each section of a 64-bit ELF file."""
    table = struct.unpack_from("<Q", data, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    for header in headers:
        begin = headers[names][4] + header[0]
        yield data[begin : data.index(0, begin)].decode(), header[4], header[5]


def entries(data: bytes, begin: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Kind, architecture, place and size of each entry's payload in a .nv_fatbin section."""
    at, end = begin, begin + size
    while at < end - 16:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != MAGIC:
            at += 8
            continue
        entry, at = at + header, at + header + length
        while entry < at:
            kind, _, own, payload = struct.unpack_from("<HHIQ", data, entry)
            yield kind, struct.unpack_from("<I", data, entry + 28)[0], entry + own, payload
            entry += own + payload


def main() -> None:
    source, target, wanted = sys.argv[1:]
    data = bytearray(Path(source).read_bytes())
    for name, begin, size in list(sections(bytes(data))):
        if name == ".nv_fatbin":
            for kind, architecture, place, length in list(entries(bytes(data), begin, size)):
                if kind != CODE or architecture != int(wanted):
                    data[place : place + length] = bytes(length)
    Path(target).write_bytes(data)


if __name__ == "__main__":
    main()
