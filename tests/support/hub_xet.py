"""The storage behind the loopback Hub's Xet uploads: takes xorbs and shards, gives back files.

Formats: https://huggingface.co/docs/xet (xorb, shard, API). Only the direct `/v1` upload is spoken;
clients that know newer ways fall back to it on 404.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Protocol

from hub_store import Blob

_HEADER = 48
_ENTRY = 48
_END = b"\xff" * 32
_WITH_VERIFICATION = 1 << 31
_WITH_SHA256 = 1 << 30
_LZ4_MAGIC = 0x184D2204


class _Large(Protocol):
    def __setitem__(self, key: str, value: Blob) -> None: ...


class XetStore:
    """Keeps chunks by xorb; puts every file that a shard describes into `large`."""

    def __init__(self, large: _Large) -> None:
        self.large = large
        self.xorbs: dict[str, list[bytes]] = {}

    def add_xorb(self, name: str, body: bytes) -> bool:
        """Unpack a xorb. Returns whether it is new."""
        new = name not in self.xorbs
        self.xorbs[name] = list(_chunks(body))
        return new

    def add_shard(self, body: bytes) -> None:
        """Put together every file of the shard.

        Raises:
            ValueError: for a file that is not what its SHA-256 says.
            KeyError: for a xorb that was never uploaded.
        """
        at = _HEADER
        while body[at : at + 32] != _END:
            flags, entries = struct.unpack_from("<II", body, at + 32)
            at += _ENTRY
            pieces: list[bytes] = []
            for _ in range(entries):
                xorb = _hex(body[at : at + 32])
                _, size, first, last = struct.unpack_from("<IIII", body, at + 32)
                piece = b"".join(self.xorbs[xorb][first:last])
                if len(piece) != size:
                    raise ValueError(f"a term of {size} bytes has {len(piece)}")
                pieces.append(piece)
                at += _ENTRY
            at += _ENTRY * entries if flags & _WITH_VERIFICATION else 0
            blob = Blob(b"".join(pieces))
            if flags & _WITH_SHA256:
                if _hex(body[at : at + 32]) != blob.sha256:
                    raise ValueError("the file has another SHA-256 than its shard says")
                at += _ENTRY
            self.large[blob.sha256] = blob


def _hex(value: bytes) -> str:
    """A hash as text: four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", value))


def _chunks(body: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(body) and body[at : at + 7] != b"XETBLOB":
        packed = int.from_bytes(body[at + 1 : at + 4], "little")
        scheme = body[at + 4]
        size = int.from_bytes(body[at + 5 : at + 8], "little")
        data = body[at + 8 : at + 8 + packed]
        if scheme:
            data = _lz4_frame(data)
        if scheme == 2:
            data = _ungroup(data)
        if len(data) != size:
            raise ValueError(f"a chunk of {size} bytes has {len(data)}")
        yield data
        at += 8 + packed


def _ungroup(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte."""
    out, at = bytearray(len(data)), 0
    for group in range(4):
        count = len(range(group, len(data), 4))
        out[group::4] = data[at : at + count]
        at += count
    return bytes(out)


def _lz4_frame(data: bytes) -> bytes:
    magic, flags = struct.unpack_from("<IB", data)
    if magic != _LZ4_MAGIC:
        raise ValueError("no LZ4 frame")
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        length = size & 0x7FFFFFFF
        block = data[at + 4 : at + 4 + length]
        if size & 0x80000000:
            out += block
        else:
            _lz4_block(block, out)
        at += 4 + length + (4 if flags & 16 else 0)
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    at = 0
    while at < len(block):
        token = block[at]
        length, at = _lz4_length(block, at + 1, token >> 4)
        out += block[at : at + length]
        at += length
        if at >= len(block):
            return
        back = int.from_bytes(block[at : at + 2], "little")
        length, at = _lz4_length(block, at + 2, token & 15)
        length += 4
        start = len(out) - back
        pattern = bytes(out[start : start + length])
        # A match may reach into what it is writing: then its start repeats.
        out += (pattern * (length // len(pattern) + 1))[:length]


def _lz4_length(block: bytes, at: int, length: int) -> tuple[int, int]:
    if length == 15:
        while (more := block[at]) == 255:
            length, at = length + 255, at + 1
        length, at = length + more, at + 1
    return length, at
