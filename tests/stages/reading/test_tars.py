"""WebDataset shards: samples of a range of bytes, each once, with what is missing or broken in them."""

from __future__ import annotations

import io
import json
import random
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.stages.reading.support import read_all, types_of
from torchrelay.config.runs import ChunkSize, ReadOptions
from torchrelay.errors import ConfigError
from torchrelay.producer.runs.planning import find_sources, plan_chunks


def write_tar(path, files: list[tuple[str, bytes]], form=tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def jpeg(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 6), shade).save(out, "PNG")
    return out.getvalue()


def npy(values) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def test_samples_by_their_extensions(tmp_path):
    """Images, text, classes, JSON and arrays are read as what they are; the key is a column."""
    files = []
    for i in range(10):
        files += [(f"d/{i:03d}.png", jpeg(i)), (f"d/{i:03d}.txt", f"é {i}".encode()), (f"d/{i:03d}.cls", b"%d\n" % i)]
        files += [(f"d/{i:03d}.json", json.dumps({"i": i}).encode()), (f"d/{i:03d}.v.npy", npy(np.full(2, i)))]
    write_tar(tmp_path / "a.tar", files)
    options = ReadOptions({"image": "jpg;png", "v": "v.npy"}, "__key__", ("json",))
    types = types_of(image="uint8[H, W, 3]", txt="str", cls="int64", v="int64[2]")
    read = read_all(tmp_path, types, options, ChunkSize(rows=3))
    assert read.key == [f"d/{i:03d}" for i in range(10)]
    assert read.ids == [(0, i) for i in range(10)]
    assert read.columns["txt"] == [f"é {i}" for i in range(10)]
    assert read.columns["cls"] == list(range(10))
    assert [int(v[0, 0, 0]) for v in read.columns["image"]] == list(range(10))
    assert [v.tolist() for v in read.columns["v"]] == [[i, i] for i in range(10)]
    assert [json.loads(text) for text in read.keep["json"]] == [{"i": i} for i in range(10)]
    assert read.chunks > 2


def test_missing_and_broken_members_cost_their_sample(tmp_path):
    """A sample without a wanted file, with a broken one, or with a pickle in its place is a bad row."""
    files = [("a.txt", b"x"), ("a.cls", b"1"), ("b.txt", b"y"), ("c.cls", b"3"), ("c.txt", b"\xff"), ("d.cls", b"one")]
    files += [("d.txt", b"z"), ("e.txt", b"e"), ("e.cls", b"5"), ("f.pkl", b"\x80\x04."), ("g.v.npy", b"no array")]
    write_tar(tmp_path / "a.tar", files)
    read = read_all(tmp_path, types_of(txt="str", cls="int64"), ReadOptions(key="__key__"))
    assert (read.key, read.columns) == (["a", "e"], {"txt": ["x", "e"], "cls": [1, 5]})
    assert [(b.row, b.error) for b in read.bad] == [
        (1, "InputError"),
        (2, "UnicodeDecodeError"),
        (3, "ValueError"),
        (5, "InputError"),
        (6, "InputError"),
    ]
    assert read_all(tmp_path, types_of(pkl="bytes")).columns == {"pkl": [b"\x80\x04."]}


@given(
    samples=st.lists(st.sampled_from(["a", "ab", "abc"]), max_size=8),
    size=st.integers(100, 9000),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    long=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_each_sample_is_in_exactly_one_chunk(tmp_path, samples, size, form, long, seed):
    """Any chunk size, any form of tar, long names, chunks read in any order: each sample once."""
    from torchrelay.stages.reading import read_chunk

    stem = "folder/" + ("n" * 120 if long and form != tarfile.USTAR_FORMAT else "n")
    files = [(f"{stem}{i}.{e}", b"x" * (i * 300)) for i, found in enumerate(samples) for e in found]
    write_tar(tmp_path / "a.tar", files, form)
    chunks = list(plan_chunks(find_sources(tmp_path), ChunkSize(nbytes=size)))
    got = {}
    for chunk in random.Random(seed).sample(chunks, len(chunks)):
        got[chunk.number] = read_chunk(chunk, ReadOptions({"k": "__key__"})).table["k"]
    assert [k for number in sorted(got) for k in got[number]] == [f"{stem}{i}" for i in range(len(samples))]


def test_links_and_folders_in_a_tar_are_passed_over(tmp_path):
    """Only files are members; a link to /etc/passwd is not followed."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("c.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert read_all(tmp_path, types_of(txt="str")).columns == {"txt": [""]}


def test_a_cut_tar_gives_its_samples_and_one_that_says_so(tmp_path):
    """Whole samples are rows, whatever the chunks; the cut is told once, with a row's number of its own."""
    files = [(f"{i:03d}.txt", b"x" * 700) for i in range(50)]
    write_tar(tmp_path / "a.tar", files)
    raw = (tmp_path / "a.tar").read_bytes()
    for harm in (raw[: 1536 * 20 + 600], raw[: 1536 * 20] + b"garbage!" * 64 + raw[1536 * 20 + 512 :]):
        (tmp_path / "a.tar").write_bytes(harm)
        for size in (ChunkSize(), ChunkSize(rows=7)):
            read = read_all(tmp_path, types_of(txt="str"), size=size)
            assert len(read.ids) == 20
            assert "the tar is" in read.bad[-1].text
            assert len(read.bad) <= 2
            rows = [r for _, r in read.ids] + [b.row for b in read.bad]
            assert rows == list(range(len(rows)))


def test_what_is_no_tar_is_refused_when_planned(tmp_path):
    """Other bytes under the name of a tar."""
    (tmp_path / "a.tar").write_bytes(b"hello there" * 100)
    with pytest.raises(ConfigError, match="is no tar file"):
        list(plan_chunks(find_sources(tmp_path)))


@pytest.mark.parametrize("limit", [0, 1, 6, 50])
def test_limit_takes_the_first_samples(tmp_path, limit):
    """As many as asked for, over chunks."""
    write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"x") for i in range(20)])
    assert read_all(tmp_path, types_of(txt="str"), size=ChunkSize(rows=4), limit=limit).ids == [
        (0, i) for i in range(min(limit, 20))
    ]
