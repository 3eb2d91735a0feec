# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that kernel builds compress: modules, kernels, archives."""

from __future__ import annotations

import gzip
import lzma
import zlib
from pathlib import Path

import zstandard

from paprscm.errors import ConfigError

_GZIP, _XZ, _ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"


def is_compressed(start: bytes) -> bool:
    """Whether a file that begins with `start` is compressed in a format that we can read."""
    return start.startswith((_GZIP, _XZ, _ZSTD))


def uncompressed(path: Path, data: bytes | None = None) -> bytes:
    """The content of a file; as it is, unless it is compressed with gzip, xz or zstd.

    Args:
        path: the file, also for messages.
        data: its content, if it is not that of `path` itself but a part of it.

    Raises:
        ConfigError: it cannot be read, or the compressed data are damaged.
    """
    try:
        packed = path.read_bytes() if data is None else data
        if packed.startswith(_GZIP):
            return gzip.decompress(packed)
        if packed.startswith(_XZ):
            return lzma.decompress(packed)
        if packed.startswith(_ZSTD):
            # Kernel builds stream, so the frame may lack the size of its content.
            frame = zstandard.ZstdDecompressor().decompressobj()
            content = frame.decompress(packed)
            if not frame.eof:
                raise EOFError("it ends in the middle")
            return content
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError(f"{path} is compressed and damaged: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return packed
