"""Opening the output folder of a run: fresh, to go on, or refused; what counts as done, and what is tidied away."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
from dataclasses import replace
from pathlib import Path

import pyarrow.dataset
import pytest

from tests.conftest import wait_until
from tests.dying import deaths_that_differ, die
from tests.producer.runs.support import manifest_text, opened, plan_for, put, sources
from tests.stages.writing.support import unfinished, visible
from torchrelay.config.runs import ChunkSize, ReadOptions
from torchrelay.errors import ConfigError, DecodeError, RunConflict
from torchrelay.producer import runs
from torchrelay.producer.runs import holding
from torchrelay.producer.runs.folder import Entering, check_folder, open_existing, open_run
from torchrelay.producer.runs.manifest import read_manifest
from torchrelay.producer.runs.reading import rows
from torchrelay.stages import writing
from torchrelay.stages.writing.stores import LocalStore, open_store

ROOT = Path(__file__).parents[3]
CODE = [str(Path(runs.__file__).parent), str(Path(writing.__file__).parent)]


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out"


def test_a_fresh_run_is_empty_and_is_refused_a_second_time(folder: str) -> None:
    """The refusal names the run, its pipeline and the ways on; the folder is as it was."""
    with opened(folder) as run:
        assert run.done() == set()
        assert [[s.path for s in batch] for batch in run.batches] == [["/data/a", "/data/b"]]
        put(run, 1, [0])
    with pytest.raises(RunConflict, match=rf"holds run {run.run} of embed .*--resume, or choose another folder"):
        opened(folder)
    with opened(folder, resume=True) as again:
        assert again.run == run.run


def test_going_on_finds_exactly_the_chunks_that_are_there(folder: str) -> None:
    """Whoever wrote them: also parts that no driver heard of."""
    with opened(folder) as run:
        put(run, 0, [0, 1])
        put(run, 2, [4], failed=[5])
    with opened(folder, resume=True) as run:
        assert run.done() == {0, 2}
        put(run, 1, [2, 3])
        run.look()
        assert run.done() == {0, 1, 2}
    assert [row["x"] for row in rows(folder)] == [0, 1, 2, 3, 4]


def test_resume_where_there_is_no_run_begins_one(folder: str) -> None:
    """So that a command can be repeated until it is done."""
    with opened(folder, resume=True) as run:
        assert run.done() == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "ffffffff"}, 'version of the pipeline was "0a1b2c3d", and is "ffffffff" now'),
        ({"pipeline": "other"}, 'pipeline was "embed", and is "other" now'),
        ({"read": ReadOptions({"text": "body"})}, 'columns was {}, and is {"text": "body"} now'),
        ({"key": "id"}, 'key was none, and is "id" now'),
        ({"keep": ("url",)}, 'keep was none, and is \\["url"\\] now'),
        ({"format": "jsonl"}, 'format was "parquet", and is "jsonl" now'),
        ({"limit": 5}, "limit was none, and is 5 now"),
        ({"given": sources("a")}, "/data/b is gone from the input"),
        ({"given": sources("a", "b", change="2")}, "/data/a has changed since\n  /data/b has changed since"),
    ],
)
def test_what_would_give_other_results_is_refused_by_name(folder: str, change: dict, message: str) -> None:
    """Another pipeline, option or input is a conflict that says what differs; the folder stays as it was."""
    with opened(folder) as run:
        put(run, 0, [0])
    with pytest.raises(RunConflict, match=message):
        opened(folder, resume=True, **change)
    with opened(folder, resume=True) as again:
        assert again.done() == {0}


def test_all_that_differs_is_listed_at_once(tmp_path: Path) -> None:
    """A user need not find out one by one."""
    with opened(tmp_path, sources(*(f"f{i}" for i in range(20)))) as run:
        put(run, 0, [0])
    with pytest.raises(RunConflict) as caught:
        opened(tmp_path, sources("new"), resume=True, version="f" * 8, limit=1)
    text = str(caught.value)
    assert "version" in text
    assert "limit" in text
    assert "/data/f0 is gone" in text
    assert "... and 15 more is gone from the input" in text


def test_chunk_size_is_tuning_and_the_first_one_stays(tmp_path: Path) -> None:
    """Another size may be asked for, and the plan of the run stays what it was: its parts are named by it."""
    opened(tmp_path, size=ChunkSize(100, 1000)).close()
    with opened(tmp_path, resume=True, size=ChunkSize(7, 7)) as run:
        assert run.size == ChunkSize(100, 1000)


def test_added_files_come_behind_in_a_batch_of_their_own(folder: str) -> None:
    """Whatever their names: numbers of sources that are known do not change, over any number of starts."""
    opened(folder, sources("b", "d")).close()
    opened(folder, sources("a", "b", "c", "d"), resume=True).close()
    opened(folder, sources("a", "b", "c", "d"), resume=True).close()
    with opened(folder, sources("a", "b", "c", "d", "e"), resume=True) as run:
        batches = [[(s.number, s.path) for s in batch] for batch in run.batches]
    assert batches == [[(0, "/data/b"), (1, "/data/d")], [(2, "/data/a"), (3, "/data/c")], [(4, "/data/e")]]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("change", [{"version": "ffffffff"}, {"size": ChunkSize(5, 10)}, {"format": "jsonl"}])
def test_a_run_without_any_part_is_begun_anew(folder: str, resume: bool, change: dict) -> None:
    """Its first try failed, perhaps as a stage did not load: nothing of it is worth to be kept, nor in the way."""
    opened(folder).close()
    with opened(folder, resume=resume, **change) as run:
        assert run.manifest.plan.version == change.get("version", "0a1b2c3d")
        put(run, 0, [0])
    with pytest.raises(RunConflict, match="--resume, or choose"):
        opened(folder)
    with opened(folder, resume=True, **change) as again:
        assert (again.run, again.done()) == (run.run, {0})


def test_the_same_run_without_any_part_stays_the_same(folder: str) -> None:
    """Its jobs may still be under way, and what they write counts."""
    with opened(folder) as first:
        pass
    with opened(folder) as second:
        assert second.run == first.run


def test_another_version_does_what_is_left_where_that_is_accepted(folder: str) -> None:
    """The manifest tells of both; nothing else may differ."""
    with opened(folder) as run:
        put(run, 0, [0], failed=[1])
    with pytest.raises(RunConflict, match="add --accept-version"):
        opened(folder, resume=True, version="ffffffff")
    accept = Entering(resume=True, accept_version=True)
    with pytest.raises(RunConflict, match="limit was none, and is 5 now") as caught:
        open_run(plan_for(folder, version="ffffffff", limit=5), accept)
    assert "accept-version" not in str(caught.value)
    with open_run(plan_for(folder, version="ffffffff"), accept) as again:
        assert (again.run, again.done(), [r.rows for r in again.retries()]) == (run.run, {0}, [((0, 1),)])
    with opened(folder, resume=True, version="ffffffff") as again:
        assert again.manifest.plan.version == "ffffffff"
        assert [version for version, _ in again.manifest.earlier] == ["0a1b2c3d"]
    with pytest.raises(RunConflict, match="version of the pipeline was"):
        opened(folder, resume=True)


def test_a_folder_with_files_of_others_is_refused(tmp_path: Path) -> None:
    """It is not meant, most likely. If that is said they may stay, but for those whose rows would mix with a run's."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").write_text("")
    opened(out).close()
    other = tmp_path / "other"
    (other / "notes").mkdir(parents=True)
    for n in range(6):
        (other / f"a{n}.md").write_text("")
    with pytest.raises(RunConflict, match=r"holds 'a0.md', .*'a4.md' and 2 more, and no run; .* --into-existing"):
        opened(other)
    assert not (other / "_run").exists() or not (other / "_run/manifest.json").exists()
    open_run(plan_for(other), Entering(into_existing=True)).close()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/mine.parquet").write_text("")
    for how in (Entering(), Entering(into_existing=True)):
        with pytest.raises(RunConflict, match=r"holds 'mine.parquet' and no run"):
            open_run(plan_for(tmp_path / "mixed"), how)
    assert not (tmp_path / "mixed/_run/manifest.json").exists()


def test_what_a_folder_would_be_refused_for_is_told_without_touching_it(tmp_path: Path) -> None:
    """A run that is there, files of others, a file in its place: and nothing is made."""
    new = tmp_path / "new" / "out"
    check_folder(plan_for(new))
    assert not new.parent.exists()
    with opened(tmp_path / "run") as run:
        put(run, 0, [0])
        with pytest.raises(RunConflict, match="drives a run there now"):
            check_folder(plan_for(tmp_path / "run"), Entering(resume=True))
    check_folder(plan_for(tmp_path / "run"), Entering(resume=True))
    with pytest.raises(RunConflict, match="--resume, or choose"):
        check_folder(plan_for(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file where a folder is needed"):
        check_folder(plan_for(tmp_path / "file" / "out"))


DRIVER = """
    import sys, time
    from tests.producer.runs.support import opened
    run = opened(sys.argv[1], resume=True)
    print("open", flush=True)
    time.sleep(60)
"""


def test_two_drivers_do_not_work_on_one_folder(tmp_path: Path) -> None:
    """The second is told who holds it; after a kill -9 of the first it may at once."""
    first = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(RunConflict, match=rf"process {first.pid} on .* drives a run there now"):
            opened(tmp_path, resume=True)
        # To look at it needs no hold.
        assert list(rows(str(tmp_path))) == []
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    opened(tmp_path, resume=True).close()


def test_a_child_of_the_driver_does_not_hold_the_folder(tmp_path: Path) -> None:
    """A forked process that outlives the driver has no part in its lock."""
    run = opened(tmp_path)
    child = os.fork()
    if child == 0:
        signal.pause()
    run.close()

    def free() -> bool:
        try:
            opened(tmp_path, resume=True).close()
        except RunConflict:
            return False  # the child has not run yet
        return True

    try:
        wait_until(free)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_behind_a_url_a_record_says_who_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is renewed, another is refused; when it is old, another takes over, and the first finds out."""
    folder = f"memory://{uuid.uuid4().hex}/out"
    run = opened(folder)
    with pytest.raises(RunConflict, match=rf"process {os.getpid()} on "):
        opened(folder, resume=True)
    monkeypatch.setattr(holding, "RENEW_S", 0.0)
    run.renew()
    monkeypatch.setattr(holding, "STALE_S", -1.0)
    second = opened(folder, resume=True)
    with pytest.raises(RunConflict, match="drives a run there now"):
        run.renew()
    run.close()
    second.renew()
    second.close()
    monkeypatch.setattr(holding, "STALE_S", 60.0)
    opened(folder, resume=True).close()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "npy"])
def test_what_does_not_verify_is_put_aside_and_done_again(tmp_path: Path, kind: str) -> None:
    """A cut part, and one whose file is gone; nothing is deleted."""
    with opened(tmp_path, format=kind) as run:
        for chunk in range(3):
            put(run, chunk, [chunk])
    for chunk, act in enumerate((lambda p: p.write_bytes(p.read_bytes()[:-3]), lambda p: p.unlink())):
        act(next(tmp_path.glob(f"part-0000000{chunk}.*")))
    with opened(tmp_path, resume=True, format=kind) as run:
        assert run.done() == {2}
        for chunk in (0, 1):
            assert not put(run, chunk, [chunk]).adopted
    assert [row["x"] for row in rows(str(tmp_path))] == [0, 1, 2]
    assert list((tmp_path / "_run/bad").iterdir())


def test_a_part_that_is_lost_while_the_run_goes_on_is_seen(tmp_path: Path) -> None:
    """Parts that were whole are not opened again, and their files are looked for all the same."""
    for kind in ("parquet", "jsonl", "npy"):
        with opened(tmp_path / kind, format=kind) as run:
            for chunk in range(3):
                put(run, chunk, [chunk])
            run.look()
            assert run.done() == {0, 1, 2}
            next((tmp_path / kind).glob("part-00000001.*")).unlink()
            next((tmp_path / kind).glob("part-00000002.*")).write_bytes(b"")
            run.look()
            assert run.done() == {0}


def test_a_record_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """A folder may come from anybody; what it says leads no file out of it, or into it."""
    (tmp_path / "secret").write_text("mine")
    with opened(tmp_path / "out", format="jsonl") as run:
        put(run, 0, [0])
    path = tmp_path / "out/_run/parts/part-00000000.json"
    whole = json.loads(path.read_text())
    for name, made_as in (("../x", "y"), ("part-0/../../x", "y"), ("part-1.jsonl", "../../../secret")):
        part = json.loads(whole["torchrelay.part"])
        part["files"] = [[name, made_as, 4]]
        path.write_text(json.dumps(whole | {"torchrelay.part": json.dumps(part)}))
        with opened(tmp_path / "out", format="jsonl", resume=True) as run:
            assert run.done() == set()
        assert sorted(os.listdir(tmp_path)) == ["out", "secret"]
        assert "mine" not in [p.read_text() for p in (tmp_path / "out").iterdir() if p.is_file()]


def test_where_files_cannot_be_locked_a_record_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some mounted file systems; unfinished files then stay, for nobody can tell whose writer lives."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    run = opened(tmp_path)
    put(run, 0, [0])
    with pytest.raises(RunConflict, match=rf"process {os.getpid()} on "):
        opened(tmp_path, resume=True)
    (tmp_path / "_run/tmp/.part-1").write_bytes(b"")
    run.look()
    assert run.done() == {0}
    assert unfinished(tmp_path) == [".part-1"]
    run.close()
    opened(tmp_path, resume=True).close()


def test_a_part_of_another_run_is_named(tmp_path: Path) -> None:
    """Copied in by hand; it is left where it is."""
    with opened(tmp_path / "a") as run:
        put(run, 0, [0])
    opened(tmp_path / "b").close()
    (tmp_path / "b/part-00000000.parquet").write_bytes((tmp_path / "a/part-00000000.parquet").read_bytes())
    with pytest.raises(RunConflict, match=rf"part-00000000.parquet: it belongs to run {run.run}"):
        opened(tmp_path / "b", resume=True)
    assert visible(tmp_path / "b") == ["part-00000000.parquet"]


def test_of_two_parts_of_a_chunk_behind_a_url_one_counts() -> None:
    """The committed one, also later; the other is gone when the run was looked at."""
    folder = f"memory://{uuid.uuid4().hex}/out"
    with opened(folder) as run:
        store = run.output.store
        for fence in ("w-1", "w-2"):
            names = list(store.sizes(""))
            for name in names:  # the second does not see the first, as when both look before either writes
                store.write(f"aside/{name}", store.read(name))
                store.remove(name)
            second = put(run, 0, [0, 1], fence=fence)
            for name in names:
                store.write(name, store.read(f"aside/{name}"))
        assert len(store.sizes("")) == 2
        run._winners[0, 0] = second.name
        run.look()
        assert list(store.sizes("")) == [second.name]
    with opened(folder, resume=True) as run:
        assert [found.name for found in run.parts.values()] == [second.name]


def test_a_chunk_with_rows_goes_before_one_without(tmp_path: Path) -> None:
    """Two writers of one chunk, of whom one got no row through, in the same moment."""
    with opened(tmp_path) as run:
        put(run, 0, [], failed=[0, 1])
        os.rename(tmp_path / "_run/empty/part-00000000.parquet", tmp_path / "aside")
        put(run, 0, [0, 1])
        os.rename(tmp_path / "aside", tmp_path / "_run/empty/part-00000000.parquet")
        run.look()
        assert run.parts[0, 0].record.rows == 2
    assert list((tmp_path / "_run/empty").iterdir()) == []


def test_an_interrupted_folder_reads_as_a_dataset(tmp_path: Path) -> None:
    """With unfinished files, a manifest and parts without rows beside the parts."""
    with opened(tmp_path) as run:
        put(run, 0, [], failed=[0])
        put(run, 1, [1, 2])
        (tmp_path / "_run/tmp").mkdir(exist_ok=True)
        (tmp_path / "_run/tmp/.part-00000002.w-1.aa.parquet").write_bytes(b"half")
        assert pyarrow.dataset.dataset(tmp_path).to_table()["x"].to_pylist() == [1, 2]
    assert unfinished(tmp_path) == [".part-00000002.w-1.aa.parquet"]
    opened(tmp_path, resume=True).close()
    assert unfinished(tmp_path) == []


def test_rows_to_try_again_are_those_of_the_last_round(folder: str) -> None:
    """What failed, chunk by chunk; when tried again, what failed then."""
    with opened(folder) as run:
        put(run, 0, [0, 2], failed=[1, 3])
        put(run, 1, [4, 5])
        put(run, 2, [], failed=[6])
        run.look()
        assert list(run.retries()) == [(0, 1, ((0, 1), (0, 3))), (2, 1, ((0, 6),))]
        put(run, 0, [3], failed=[1], round_=1)
        put(run, 2, [6], round_=1)
    with opened(folder, resume=True) as run:
        assert list(run.retries()) == [(0, 2, ((0, 1),))]
        assert run.done() == {0, 1, 2}
    assert [row["x"] for row in rows(folder)] == [0, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "npy"])
def test_who_only_reads_writes_nothing(tmp_path: Path, kind: str) -> None:
    """Not even a folder: it may be somebody else's, and its driver at work."""
    with opened(tmp_path / "out", format=kind) as run:
        put(run, 0, [0, 1])
        put(run, 1, [2])
    next((tmp_path / "out").glob("part-00000001.*")).unlink()
    shutil.rmtree(tmp_path / "out/_run/tmp")
    before = {p: p.stat().st_mtime_ns for p in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}
    assert [row["x"] for row in rows(str(tmp_path / "out"))] == [0, 1]
    assert before == {p: p.stat().st_mtime_ns for p in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}


def test_a_manifest_that_is_damaged_is_named(tmp_path: Path) -> None:
    """Cut anywhere, of another schema, or with another list of sources."""
    opened(tmp_path).close()
    path = tmp_path / "_run/manifest.json"
    whole = path.read_text()
    for text in ("", "{}", "[]", whole[:200], whole.replace('"torchrelay_run": 1', '"torchrelay_run": 99')):
        path.write_text(text)
        with pytest.raises(DecodeError, match=r"manifest.json is not readable"):
            opened(tmp_path, resume=True)
    path.write_text(whole)
    listed = tmp_path / f"_run/sources-{manifest_text(tmp_path)['sources']}.jsonl"
    listed.write_text(listed.read_text().replace("/data/a", "/data/z"))
    with pytest.raises(DecodeError, match="is damaged"):
        opened(tmp_path, resume=True)


def test_a_manifest_names_no_code_to_run(tmp_path: Path) -> None:
    """Who reads a folder must name the writer's class himself; a folder that says os:system gets nothing run."""
    opened(tmp_path).close()
    path = tmp_path / "_run/manifest.json"
    path.write_text(path.read_text().replace('"format": "parquet"', '"format": "antigravity:fly"'))
    with pytest.raises(ConfigError, match="pass format='antigravity:fly' to run that code"):
        open_existing(str(tmp_path))
    assert "antigravity" not in sys.modules
    with pytest.raises(ConfigError, match="holds no run"):
        open_existing(str(tmp_path / "nothing"))


def test_a_driver_may_die_at_any_line_of_opening(tmp_path: Path) -> None:
    """The folder then holds the whole run or none, and opening it again gives a run with all its sources."""
    code = "import sys; from tests.producer.runs import test_folder; test_folder.drivers_die(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def drivers_die(base: str) -> None:
    def fresh(where: Path) -> None:
        opened(where, sources("a", "b")).close()

    def with_more(where: Path) -> None:
        opened(where, sources("0", "a", "b"), resume=True).close()

    def prepared(where: Path) -> Path:
        with opened(where, sources("a", "b")) as run:
            put(run, 0, [0])
        return where

    fresh(Path(base) / "first")
    dry = Path(base) / "dry" / "out"
    dry.parent.mkdir()
    points = deaths_that_differ(lambda: fresh(dry), CODE, dry.parent)
    assert len(points) > 10
    begun = 0
    for at in points:
        where = Path(base) / f"fresh-{at}"
        die(lambda where=where: fresh(where), CODE, at)
        manifest = read_manifest(open_store(str(where)))
        begun += manifest is not None
        assert visible(where) == []
        with opened(where, sources("a", "b"), resume=manifest is not None) as run:
            assert [[s.path for s in b] for b in run.batches] == [["/data/a", "/data/b"]]
        assert unfinished(where) == []
    assert 0 < begun < len(points)
    with_more(prepared(Path(base) / "second"))
    again = prepared(Path(base) / "again" / "out")
    points = deaths_that_differ(lambda: with_more(again), CODE, again.parent)
    assert len(points) > 10
    for at in points:
        where = prepared(Path(base) / f"more-{at}")
        die(lambda where=where: with_more(where), CODE, at)
        with opened(where, sources("0", "a", "b"), resume=True) as run:
            assert [[s.path for s in b] for b in run.batches] == [["/data/a", "/data/b"], ["/data/0"]]
            assert run.done() == {0}
        assert len(list((where / "_run").glob("sources-*"))) == 1
        assert unfinished(where) == []


def test_opening_a_folder_that_cannot_be_used_gives_it_free(tmp_path: Path) -> None:
    """A refused start leaves no lock behind."""
    with opened(tmp_path) as run:
        put(run, 0, [0])
    for _ in range(2):
        with pytest.raises(RunConflict, match="holds run"):
            open_run(plan_for(tmp_path))
    run = open_run(replace(plan_for(tmp_path), input="elsewhere"), Entering(resume=True))
    assert isinstance(run.output.store, LocalStore)
    run.close()
    run.close()
    wait_until(lambda: opened(tmp_path, resume=True).close() is None, 1.0)
