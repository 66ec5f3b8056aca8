"""Indexed PNG pictures: a map's cells, and one palette for each colour scheme."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

Color = tuple[int, int, int]

NUM_SHADES = 254
BROKEN, MISSING = 254, 255

# From little to much, each scheme from near its background to far from it.
LIGHT: tuple[Color, ...] = ((238, 243, 248), (178, 209, 226), (92, 160, 197), (37, 99, 160), (14, 42, 92))
DARK: tuple[Color, ...] = ((27, 37, 50), (31, 74, 110), (40, 126, 148), (112, 190, 150), (246, 232, 140))
BROKEN_COLOR: tuple[Color, Color] = ((200, 30, 60), (255, 92, 120))


def palette(anchors: Sequence[Color], broken: Color) -> bytes:
    """Return 256 colours: shades between ``anchors``, one for what is not finite, one for nothing."""
    shades = []
    for index in range(NUM_SHADES):
        place = index / (NUM_SHADES - 1) * (len(anchors) - 1)
        low = min(int(place), len(anchors) - 2)
        share = place - low
        pairs = zip(anchors[low], anchors[low + 1], strict=True)
        shades.append(bytes(round(a + (b - a) * share) for a, b in pairs))
    return b"".join(shades) + bytes(broken) + bytes(3)


def png(rows: Sequence[bytes], colors: bytes) -> str:
    """Return a picture as a data URL; each row has one byte for each cell, an index of ``colors``."""
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 6)
    transparent = b"\xff" * MISSING + b"\0"
    chunks = [(b"IHDR", header), (b"PLTE", colors), (b"tRNS", transparent), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))
        for name, payload in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def both(rows: Sequence[bytes]) -> tuple[str, str]:
    """Return the picture for light and for dark pages."""
    light, dark = BROKEN_COLOR
    return png(rows, palette(LIGHT, light)), png(rows, palette(DARK, dark))
