"""Types of copied columns in ``xfast encode``: no value is rounded, and what cannot be copied is known at the start."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import encode
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stilts

from xfast.encode import store
from xfast.errors import DataFileError

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)

VIEW = getattr(pa, "string_view", pa.string)()
PRICE = Decimal("12345678901234567890.12")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.list_(VIEW), [["a", "b"], None, [], ["c"]]),
        (pa.large_list(VIEW), [["a"], [], None, ["c", None]]),
        (pa.list_(VIEW, 1), [["a"], ["b"], ["c"], ["d"]]),
        (
            pa.struct([("s", VIEW), ("n", pa.int64())]),
            [{"s": "a", "n": 1}, None, {"s": None, "n": 3}, {"s": "d", "n": 4}],
        ),
        (pa.list_(pa.struct([("q", pa.list_(VIEW))])), [[{"q": ["x"]}], [], None, [{"q": None}]]),
    ],
    ids=str,
)
def test_views_inside_other_types(base: Path, tmp_path: Path, kind: pa.DataType, values: list[Any]) -> None:
    table = {"text": ["a", None, "b", "c"], "kept": pa.array(values, kind)}
    encode.parquet(tmp_path / "in.parquet", table)
    encode.run(tmp_path / "in.parquet", tmp_path / "out", base, on_error="skip", shard_rows=3)
    assert encode.read(tmp_path / "out").column("kept").to_pylist() == [values[0], *values[2:]]


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.date32()], ids=str)
def test_times_that_python_has_not_are_copied(base: Path, tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(
        [1, 2**31 - 1 if pa.types.is_date(kind) else 2**62], pa.int32() if kind.bit_width == 32 else pa.int64()
    )
    encode.parquet(tmp_path / "in.parquet", {"text": ["a", "b"], "kept": values.cast(kind)})
    encode.run(tmp_path / "in.parquet", tmp_path / "out", base)
    assert encode.read(tmp_path / "out").column("kept").combine_chunks().equals(values.cast(kind))


@pytest.mark.skipif(not hasattr(pa, "list_view"), reason="this release of pyarrow has no list views")
def test_views_that_pyarrow_cannot_cast_are_refused(base: Path, tmp_path: Path) -> None:
    table = {"text": ["a", "b"], "kept": pa.array([["x"], ["y"]], pa.list_view(VIEW))}
    encode.parquet(tmp_path / "in.parquet", table)
    with pytest.raises(DataFileError, match=r"column 'kept' is list_view.*--keep"):
        encode.run(tmp_path / "in.parquet", tmp_path / "out", base)
    encode.run(tmp_path / "in.parquet", tmp_path / "out", base, keep=())


def two_files(folder: Path, one: pa.Array, other: pa.Array, **options: Any) -> Path:
    folder.mkdir()
    for name, values in (("a", one), ("b", other)):
        pq.write_table(pa.table({"text": ["x"] * len(values), "v": values}), folder / f"{name}.parquet", **options)
    return folder


def test_decimals_are_not_rounded(base: Path, tmp_path: Path) -> None:
    decimal, double = pa.array([PRICE], pa.decimal128(38, 2)), pa.array([0.5])
    for i, (one, other) in enumerate(((decimal, double), (double, decimal))):
        source = two_files(tmp_path / str(i), one, other)
        with pytest.raises(
            DataFileError, match=rf"{'ab'[i]}\.parquet: column 'v' is decimal128\(38, 2\) here, and double"
        ):
            encode.run(source, tmp_path / "out", base)
    lists = pa.array([[PRICE]], pa.list_(pa.decimal128(38, 2))), pa.array([[0.5]])
    with pytest.raises(DataFileError, match="column 'v' is list<"):
        encode.run(two_files(tmp_path / "lists", *lists), tmp_path / "out", base)
    records = pa.array([{"p": PRICE}], pa.struct([("p", pa.decimal128(38, 2))])), pa.array([{"q": 1, "p": 0.5}])
    with pytest.raises(DataFileError, match="column 'v' is struct<"):
        encode.run(two_files(tmp_path / "records", *records), tmp_path / "out", base)
    encode.run(two_files(tmp_path / "same", decimal, decimal), tmp_path / "same-out", base)
    assert encode.read(tmp_path / "same-out").column("v").to_pylist() == [PRICE] * 2


@pytest.mark.parametrize(
    ("value", "kind"), [(2**53 + 1, pa.float64()), (-(2**62), pa.float64()), (2**53 + 1, pa.float32())]
)
def test_whole_numbers_beside_fractions_are_known_at_the_start(
    base: Path, tmp_path: Path, value: int, kind: pa.DataType
) -> None:
    numbers, fractions = pa.array([1, value, 2]), pa.array([0.5], kind)
    with pytest.raises(DataFileError, match=rf"a\.parquet: column 'v' has {value} here and fractions elsewhere"):
        encode.run(two_files(tmp_path / "in", numbers, fractions), tmp_path / "out", base, shard_rows=1)
    assert not list((tmp_path / "out").glob("*.parquet"))
    encode.run(two_files(tmp_path / "small", pa.array([1, None, 3]), fractions), tmp_path / "small-out", base)
    assert encode.read(tmp_path / "small-out").column("v").to_pylist() == [1.0, None, 3.0, 0.5]
    unknown = two_files(tmp_path / "unknown", numbers, fractions, write_statistics=False)
    with pytest.raises(DataFileError, match="column 'v'"):  # later, but not rounded
        encode.run(unknown, tmp_path / "unknown-out", base, shard_rows=1)


def test_whole_numbers_of_one_file_beside_fractions_of_another(base: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    encode.jsonl(tmp_path / "in" / "a.jsonl", [{"text": "a", "v": 1}, {"text": "b", "v": 2**60 + 1}])
    encode.jsonl(tmp_path / "in" / "b.jsonl", [{"text": "c", "v": 0.5}])
    with pytest.raises(DataFileError, match=rf"a\.jsonl: column 'v' has {2**60 + 1} here and fractions elsewhere"):
        encode.run(tmp_path / "in", tmp_path / "out", base, shard_rows=1)
    assert not list((tmp_path / "out").glob("*.parquet"))


NULLS = {
    "structs with a field of nulls": [{"a": None, "b": i} for i in range(7)],
    "lists of nulls": [[None, None], [None], [], None, [None], [None, None, None], []],
    "lists of structs of nulls": [[{"a": None}], [], None, [{"a": None}, {"a": None}], [], [], [{"a": None}]],
}


@pytest.mark.parametrize("values", list(NULLS.values()), ids=list(NULLS))
def test_nulls_inside_other_types(base: Path, tmp_path: Path, values: list[Any]) -> None:
    encode.parquet(tmp_path / "in" / "a.parquet", {"text": ["x"] * 7, "v": pa.array(values)})
    encode.jsonl(tmp_path / "in" / "b.jsonl", [{"text": "x", "v": value} for value in values])
    for rows in (1, 2, 3, 7):
        encode.run(tmp_path / "in", tmp_path / f"out{rows}", base, shard_rows=rows)
        assert encode.read(tmp_path / f"out{rows}").column("v").to_pylist() == [*values, *values]


def test_what_is_nested_too_deeply_for_parquet_is_known_at_the_start(base: Path, tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(60):
        value = [value]
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": "x", "v": value}])
    with pytest.raises(DataFileError, match=r"too deeply nested.*--keep"):
        encode.run(source, tmp_path / "out", base)
    assert not list((tmp_path / "out").glob("*.parquet"))
    encode.run(source, tmp_path / "out", base, keep=())


def test_two_fields_of_one_name_are_refused(base: Path, tmp_path: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(DataFileError, match=r"two fields of one name.*--keep"):
        encode.run(two_files(tmp_path / "in", twice, twice), tmp_path / "out", base)


def test_large_shards_have_several_row_groups(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": "river stone lamp " * (1 + i % 3)} for i in range(20)])
    encode.run(source, tmp_path / "one", base, pooling="none")
    monkeypatch.setattr(store, "_GROUP_BYTES", 8000)
    encode.run(source, tmp_path / "several", base, pooling="none")
    one, several = (pq.ParquetFile(tmp_path / name / "shard-000000.parquet") for name in ("one", "several"))
    assert one.num_row_groups == 1 and several.num_row_groups > 3
    assert encode.read(tmp_path / "several").equals(encode.read(tmp_path / "one"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([Decimal("1.25")]), pa.array([7])),
        (pa.array([7], pa.int32()), pa.array([Decimal("1.25")])),
        (pa.array([[Decimal("1.25")]]), pa.array([[7]])),
    ],
    ids=str,
)
def test_integers_that_the_common_decimal_does_not_hold(
    base: Path, tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    """Arrow names decimal(20, 2) for int64 with decimal(3, 2), which the longest integers do not fit."""
    with pytest.raises(DataFileError, match=r"is (list<.*)?int\d\d.* here, and .*does not hold all.*--keep"):
        encode.run(two_files(tmp_path / "in", one, other), tmp_path / "out", base)


def test_decimals_of_different_sizes_and_small_integers(base: Path, tmp_path: Path) -> None:
    long, short = pa.array([Decimal("1" * 30)]), pa.array([7], pa.int16())
    encode.run(two_files(tmp_path / "in", short, long), tmp_path / "out", base)
    assert encode.read(tmp_path / "out").column("v").to_pylist() == [7, Decimal("1" * 30)]


def test_a_column_whose_name_is_the_path_of_another(base: Path, tmp_path: Path) -> None:
    """Parquet calls both a.b."""
    kept = {"a.b": pa.array([1, 2]), "a": pa.array([{"b": "x"}, {"b": "y"}])}
    encode.parquet(tmp_path / "in.parquet", {"text": ["a", "b"], **kept})
    encode.run(tmp_path / "in.parquet", tmp_path / "out", base)
    for name, values in kept.items():
        assert encode.read(tmp_path / "out").column(name).to_pylist() == values.to_pylist()
