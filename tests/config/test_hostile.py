"""Inputs made to hurt: each gets the one error that names it, and nothing else comes out."""

from __future__ import annotations

import enum
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_cli
from torchrelay.config import Pipeline, parse_type
from torchrelay.config.columns import check_table, table_of_row
from torchrelay.config.imports import import_use, resolve_inside, split_use
from torchrelay.errors import ConfigError, InputError

HEAD = "pipeline: p\nstages:\n"
STAGE = "from torchrelay import Stage\nclass A(Stage):\n    def forward(self, batch):\n        return {}\n"


class Colour(str, enum.Enum):  # noqa: UP042  # StrEnum's str() is another
    """A text that is also a member of something."""

    RED = "r"


class Hostile:
    """Raises wherever it is looked at."""

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise KeyError("__array__")

    def __repr__(self) -> str:
        raise RuntimeError("__repr__")


def test_a_text_that_is_an_enum_member_is_carried_as_its_text():
    """`class Colour(str, Enum)` goes in as its value, not as `Colour.RED`."""
    table = table_of_row({"a": parse_type("str")}, {"a": Colour.RED})
    assert table == {"a": ["r"]}
    assert type(table["a"][0]) is str


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("float32", Hostile(), "float32 is expected, Hostile came"),
        ("str", Hostile(), "str is expected, Hostile came"),
        ("int64", 2**64, "does not fit 64 bits"),
        ("int64", -(2**63) - 1, "does not fit 64 bits"),
        ("float32[2]", np.ma.masked_array([1.0, 2.0], [0, 1], dtype="f4"), r"masks are not carried"),
        ("float32[*]", np.array([object()]), "convert it yourself"),
        ("int64", np.datetime64("2020"), "int64 is expected"),
        ("int64", np.timedelta64(1, "s"), "int64 is expected"),
        ("float32", np.zeros((), "V4"), "float32 is expected"),
        ("float32[1]", np.zeros((1,) * 33, "f4"), "33 dims"),
    ],
)
def test_a_hostile_value_is_an_input_error(kind, value, says):
    """Objects that raise, ints beyond 64 bits, masks, object arrays and dates are refused with the column's name."""
    with pytest.raises(InputError, match=rf"column 'a'.*{says}"):
        table_of_row({"a": parse_type(kind)}, {"a": value})


def test_a_list_that_holds_itself_and_a_bottomless_one_are_input_errors():
    """Neither recursion nor depth gets further than the check."""
    endless: list[object] = []
    endless.append(endless)
    deep: object = 1
    for _ in range(5000):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(InputError, match="column 'a'"):
            table_of_row({"a": parse_type("float32[*]")}, {"a": value})


@pytest.mark.parametrize("name", ["", "a" * 65, "a\0", "a}", "{}", "a:b", "*", "a\n", "‮a", "ä"])
def test_column_names_that_could_break_out_of_their_place_are_refused(name):
    """Undeclared rows and tables take names like variables only, so that nothing behind them needs quoting."""
    with pytest.raises(InputError):
        table_of_row(None, {name: 1})
    with pytest.raises(InputError):
        check_table(None, {name: [1]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("uint8[999999999999, 999999999999]", "over 1 TiB"),
        ("complex128[274877906944]", "over 1 TiB"),
        ("json = [&a [1, 1], *a, *a]", "no YAML value"),
        ("a" * 100_000, "unknown dtype"),
        ("float32[" + "9" * 5000 + "]", "neither a number"),
        ("int64 = " + "9" * 5000, "no YAML value"),
        ("float32[" + ",".join("*" * 17) + "]", "over the limit of 16"),
    ],
)
def test_a_type_that_asks_for_too_much_is_refused_in_few_words(text, says):
    """Sizes that no machine has, aliases and endless texts are refused, and the message stays short."""
    with pytest.raises(ConfigError, match=says) as raised:
        parse_type(text)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("-2E3", -2000.0), ("inf", np.inf), ("nan", np.nan)])
def test_a_default_may_be_written_as_people_write_numbers(text, value):
    """YAML 1.1 reads 1e-5 as text; as the default of a number it is one."""
    np.testing.assert_equal(float(parse_type(f"float64 = {text}").default), value)


def test_scalars_with_a_tag_that_they_do_not_fit_are_reported_at_their_place(problems):
    """`!!bool maybe` is a problem of its line, as `!!int a` and `!!float b` are."""
    args = "".join(f"      {k}: {v}\n" for k, v in {"x": "!!bool maybe", "y": "!!int a", "z": "!!float b"}.items())
    assert problems(HEAD + "  - name: a\n    use: s.py:Stage\n    args:\n" + args) == [
        "6:7: 'maybe' cannot be read as bool; put it in quotes if it is text",
        "7:7: 'a' cannot be read as int; put it in quotes if it is text",
        "8:7: 'b' cannot be read as float; put it in quotes if it is text",
    ]


def test_padding_beside_an_input_of_an_unknown_stage_is_one_problem(problems):
    """The unknown stage is reported; the padded column, whose type then is unknown, is not."""
    yaml = HEAD + (
        "  - name: a\n    use: s.py:Stage\n"
        "  - name: b\n    use: s.py:Stage\n    inputs: {x: aa.v}\n    batch: {pad: {x: 0}}\n"
    )
    assert problems(yaml) == ["7:14: stage 'b' reads aa.v, but no stage 'aa' comes before it; did you mean 'a'?"]


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 5000])
def test_a_path_that_no_system_has_is_a_config_error(name):
    """NUL, a lone surrogate and an endless name are refused like a file that is missing."""
    with pytest.raises(ConfigError):
        Pipeline.load(name)
    with pytest.raises(ConfigError):
        resolve_inside(name, Path("."), "weights")


@pytest.mark.parametrize("use", ["__main__:A", "__main__.sub:A", "..:A", "a b:C", ":A", "m:", "m:a.b", "a..b:C"])
def test_a_use_of_no_proper_form_is_refused_before_anything_is_looked_up(use):
    """The form is checked first."""
    with pytest.raises(ConfigError):
        split_use(use)


def test_a_swapped_link_leads_nowhere(tmp_path):
    """A stage file that becomes a link out of the folder after loading is refused when it is imported."""
    home, outside = tmp_path / "home", tmp_path / "outside.py"
    home.mkdir()
    (home / "s.py").write_text(STAGE)
    outside.write_text("raise SystemExit('imported')\n")
    (home / "p.yaml").write_text(HEAD + "  - {name: a, use: 's.py:A'}\n")
    pipeline = Pipeline.load(home / "p.yaml")
    (home / "s.py").unlink()
    (home / "s.py").symlink_to(outside)
    with pytest.raises(ConfigError, match="leads out"):
        import_use("s.py:A", pipeline.base_dir)
    with pytest.raises(ConfigError, match="leads out"):
        Pipeline.load(home / "p.yaml")


def test_an_edited_stage_file_is_imported_anew(tmp_path):
    """In one process, a notebook say, another content is another module; the same content is the same class."""
    (tmp_path / "s.py").write_text("class A:\n    size = 1\n")
    first = import_use("s.py:A", tmp_path)
    assert import_use("s.py:A", tmp_path) is first
    (tmp_path / "s.py").write_text("class A:\n    size = 2\n")
    assert import_use("s.py:A", tmp_path).size == 2


@pytest.mark.parametrize(
    ("use", "says"),
    [
        ("os:system", "5:5: stage 'a': unknown argument 'command'"),
        ("sys:exit", "5:5: stage 'a': unknown argument 'command'"),
        ("subprocess:Popen", "4:5: stage 'a': "),
        ("subprocess:Popen", "must derive from torchrelay.Stage"),
        ("builtins:eval", "5:5: stage 'a': unknown argument 'command'"),
    ],
)
def test_check_refuses_what_is_no_stage_without_calling_it(tmp_path, use, says):
    """`use: os:system` is a polite error with its place and exit status 2; nothing was run."""
    (tmp_path / "p.yaml").write_text(HEAD + f"  - name: a\n    use: {use}\n    args: {{command: touch ran}}\n")
    done = run_cli("check", "p.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "p.yaml:" in done.stderr
    assert says in done.stderr
    assert not (tmp_path / "ran").exists()


def test_check_reports_all_files_and_all_arguments_in_one_run(tmp_path):
    """Unknown, missing and wrongly typed arguments of every stage of every file stand in one report."""
    (tmp_path / "s.py").write_text(
        "from torchrelay import Stage\n"
        "class A(Stage):\n"
        "    def __init__(self, size: int, rate: float = 1.0): pass\n"
        "    def forward(self, batch): return {}\n"
    )
    (tmp_path / "p.yaml").write_text(
        HEAD + "  - {name: a, use: 's.py:A', args: {sise: 1, rate: high}}\n  - {name: b, use: 's.py:B'}\n"
    )
    (tmp_path / "q.yaml").write_text("pipeline: q\nstages: 5\n")
    done = run_cli("check", "p.yaml", "q.yaml", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0].removeprefix("error ") for line in lines] == [
        *[f"{tmp_path}/p.yaml:3:30"] * 3,
        f"{tmp_path}/p.yaml:4:15",
        "q.yaml:2:1",
    ]
    for part in ("unknown argument 'sise'; did you mean 'size'?", "'size' is missing", "'rate': ", "has no 'B'"):
        assert part in done.stderr
