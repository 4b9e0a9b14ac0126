"""Folders of images and images in columns: decoded to uint8 [H, W, 3], broken ones cost themselves."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.stages.reading.support import read_all, types_of
from torchrelay.config.runs import ChunkSize, ReadOptions
from torchrelay.errors import DecodeError
from torchrelay.stages.reading import images
from torchrelay.stages.reading.images import decode, decode_column, in_threads

RGB = types_of(image="uint8[H, W, 3]")


def encoded(mode: str = "RGB", size: tuple[int, int] = (6, 4), form: str = "PNG", color=None, **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color or 0).save(out, form, **options)
    return out.getvalue()


def test_a_folder_of_images_at_any_depth(tmp_path):
    """Each image is a source of one row; its path below the folder goes along; hidden ones and companions do not."""
    names = ["b.JPG", "a b/ü.png", "a b/c/d.webp", "e.bmp", "f.gif", "g.tiff"]
    for i, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5 + i, 4), (200, 0, 0)).save(path)
    (tmp_path / "in" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "in" / "README.md").write_text("x")
    read = read_all(tmp_path / "in", RGB, ReadOptions(key="path"), ChunkSize(rows=4))
    assert read.key == sorted(names, key=lambda n: f"{tmp_path}/in/{n}")
    assert read.ids == [(i, 0) for i in range(6)]
    assert read.chunks == 2
    assert {v.shape[1] for v in read.columns["image"]} == {5, 6, 7, 8, 9, 10}
    assert all(
        v.dtype == np.uint8 and v.shape[2] == 3 and abs(int(v[0, 0, 0]) - 200) < 3 for v in read.columns["image"]
    )


def test_images_of_one_size_are_one_array(tmp_path):
    """They come stacked, whichever type is declared."""
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encoded(color=(i, 0, 0)))
    for types in (types_of(image="uint8[4, 6, 3]"), None, types_of(picture="uint8[*, *, 3]")):
        options = ReadOptions({"image": "image"}) if types is None else None
        (column,) = read_all(tmp_path, types, options).columns.values()
        assert np.stack(column).shape == (5, 4, 6, 3)
        assert [int(v[0, 0, 0]) for v in column] == list(range(5))


def test_broken_images_cost_themselves(tmp_path):
    """Cut, empty and other files, and one that is gone, are bad rows with their ids; the others are decoded."""
    jpeg = encoded(form="JPEG", size=(60, 40))
    contents = [jpeg, jpeg[: len(jpeg) // 2], b"", b"no image", encoded(), encoded()]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    from torchrelay.producer.runs.planning import find_sources, plan_chunks
    from torchrelay.stages.reading import read_chunk

    (chunk,) = plan_chunks(find_sources(tmp_path))
    (tmp_path / "5.jpg").unlink()
    read = read_chunk(chunk, ReadOptions(), RGB)
    assert read.sources.tolist() == [0, 4]
    assert [(b.source, b.row, b.error) for b in read.bad] == [
        (1, 0, "DecodeError"),
        (2, 0, "DecodeError"),
        (3, 0, "DecodeError"),
        (5, 0, "InputError"),
    ]
    assert "runcated" in read.bad[0].text
    assert "does not exist any more" in read.bad[3].text


@pytest.mark.parametrize(
    ("mode", "color", "form", "expected"),
    [
        ("L", 7, "PNG", (7, 7, 7)),
        ("RGBA", (1, 2, 3, 0), "PNG", (1, 2, 3)),
        ("P", 0, "GIF", (0, 0, 0)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("CMYK", (0, 0, 0, 255), "JPEG", (0, 0, 0)),
        ("I;16", 0x1234, "PNG", (0x12, 0x12, 0x12)),
    ],
)
def test_every_mode_becomes_rgb(mode, color, form, expected):
    """Gray, alpha, palette, CMYK and 16 bits."""
    array = decode(encoded(mode, form=form, color=color))
    assert (array.dtype, array.shape) == (np.uint8, (4, 6, 3))
    assert tuple(array[0, 0].tolist()) == expected


def test_gray_where_the_pipeline_wants_it(tmp_path):
    """A column uint8[H, W] gets gray images."""
    (tmp_path / "a.jpg").write_bytes(encoded(form="JPEG", color=(90, 90, 90)))
    (value,) = read_all(tmp_path, types_of(image="uint8[H, W]")).columns["image"]
    assert value.shape == (4, 6)
    assert abs(int(value[0, 0]) - 90) < 3


def test_large_jpegs_may_be_decoded_smaller(tmp_path):
    """By halves, no side below what is asked for; other formats come as they are."""
    (tmp_path / "a.jpg").write_bytes(encoded(form="JPEG", size=(640, 480), color=(90, 0, 0)))
    (tmp_path / "b.png").write_bytes(encoded(size=(64, 48)))
    shapes = {}
    for side in (None, 500, 200, 120, 60, 10):
        read = read_all(tmp_path, RGB, ReadOptions(image_side=side))
        shapes[side] = [v.shape[:2] for v in read.columns["image"]]
        assert abs(int(read.columns["image"][0][5, 5, 0]) - 90) < 3
    assert [s[0] for s in shapes.values()] == [(480, 640), (480, 640), (240, 320), (120, 160), (60, 80), (60, 80)]
    assert {s[1] for s in shapes.values()} == {(48, 64)}


def test_a_bomb_is_refused_before_it_is_unpacked():
    """A few bytes that announce gigapixels are an error that says how many."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")
    with pytest.raises(DecodeError, match=r"decoded|pixels"):
        decode(bomb)


def test_image_bytes_in_a_column_are_decoded_where_the_type_asks(tmp_path):
    """Bytes in Parquet become arrays for uint8[H, W, 3], stay for bytes, and broken or null ones are bad rows."""
    table = pa.table({"image": [encoded(), b"broken", None, encoded(size=(2, 2))]})
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_all(tmp_path, RGB)
    assert [v.shape for v in read.columns["image"]] == [(4, 6, 3), (2, 2, 3)]
    assert [(b.row, b.error) for b in read.bad] == [(1, "DecodeError"), (2, "InputError")]
    assert read_all(tmp_path, types_of(image="bytes?")).columns["image"][1:3] == [b"broken", None]


def test_many_images_are_decoded_by_several_threads(monkeypatch):
    """Where there are processors, and in the order in which they came."""
    monkeypatch.setattr(images, "_processors", lambda: 4)
    monkeypatch.setattr(images, "_pool", None)
    both = threading.Barrier(2, timeout=20)
    names = in_threads(lambda i: (both.wait() if i < 2 else None, threading.current_thread().name, i)[1:], range(8))
    assert [i for _, i in names] == list(range(8))
    assert len({n for n, _ in names}) >= 2
    column = decode_column([encoded(color=(i, 0, 0)) for i in range(20)])
    assert [int(v[0, 0, 0]) for v in column] == list(range(20))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_decodes_with_threads_of_its_own(monkeypatch):
    """Threads do not survive a fork; the child must not wait for those of its parent."""
    monkeypatch.setattr(images, "_processors", lambda: 2)
    decode_column([encoded()] * 8)
    child = os.fork()
    if not child:
        os._exit(0 if len(decode_column([encoded()] * 8)) == 8 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
