# SPDX-License-Identifier: Apache-2.0
"""Data and image files to try: valid ones, with bytes replaced, removed, repeated or swapped."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from typing import Any

import pandas as pd
from hypothesis import strategies as st
from PIL import Image

COLUMNS: dict[str, list[Any]] = {
    "sentence": ["aaa bbb", "bbb, 'ccc'", 'say "d"', "é ü", "tab\tend"], "label": ["good", "bad", "good", "bad", "bad"]
}  # fmt: skip
# Bytes that end a field, a line, a string or a file early, or that other formats begin with.
ODD_BYTES = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b",", b"\t", b"{", b"}", b"[" * 2000, b"]",
    b"NaN", b"null", b"1e999", b"9" * 5000, b"\xed\xa0\x80", b"\x1b[31m", b"=cmd", b"PAR1", b"PK\x03\x04", b"\x89PNG",
    b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"a" * 3000,
)  # fmt: skip


def tables() -> dict[str, bytes]:
    """Return the same examples as a file of each format, by extension."""
    table = pd.DataFrame(COLUMNS)
    rows = table.to_dict("records")
    parquet = io.BytesIO()
    table.to_parquet(parquet, index=False)
    return {
        "csv": table.to_csv(index=False).encode(),
        "tsv": table.drop(index=[2, 4]).to_csv(index=False, sep="\t").encode(),
        "json": json.dumps(rows).encode(),
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "parquet": parquet.getvalue(),
    }


def images() -> dict[str, bytes]:
    """Return the same image as a file of each format, by extension."""
    image = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
    written = {}
    for extension in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"):
        file = io.BytesIO()
        image.save(file, format=extension)
        written[extension] = file.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../outside.png", written["png"])
    return written | {"zip": archive.getvalue()}


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG file of a few hundred bytes whose header says that it has this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@st.composite
def mutated(draw: st.DrawFn, files: dict[str, bytes]) -> tuple[str, bytes]:
    """Draw one of the files, with one to four mutations, and the extension of one of them."""
    extension = draw(st.sampled_from(sorted(files)))
    data = files[extension]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 1, 2, 4, 16, len(data)])))
        inserted = draw(st.sampled_from(ODD_BYTES) | st.binary(max_size=8) | st.just(data[start : start + 40] * 2))
        data = data[:start] + inserted + data[end:]
    return draw(st.sampled_from([extension] * 9 + sorted(files))), data
