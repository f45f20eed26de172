"""The engine cache: what comes back is what was saved, byte for byte, or nothing with a reason."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_stub import KEY

from xfast.backends import tensorrt_store as stores
from xfast.backends.tensorrt_store import Key, Store, default_folder
from xfast.errors import InvalidInputError, InvalidOptionError

BLOB = bytes(range(256)) * 3


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "engines")


def saved(store: Store, key: Key = KEY, blob: bytes = BLOB) -> Path:
    path = store.save(key, blob)
    assert path is not None, store.notes
    return path


def refuses(store: Store, kind: str, key: Key = KEY) -> None:
    """``load`` gives nothing, and says so once, under that kind."""
    before = store.reasons[kind]
    assert store.load(key) is None
    assert store.reasons[kind] == before + 1, store.notes


def test_an_engine_comes_back(store: Store) -> None:
    refuses(store, "absent")
    path = saved(store)
    assert path == store.path(KEY) and path.parent == store.folder
    assert store.load(KEY) == BLOB
    assert [each.name for each in store.folder.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o077 == 0 and store.folder.stat().st_mode & 0o077 == 0
    saved(store, blob=b"new")
    assert store.load(KEY) == b"new"


@pytest.mark.parametrize(
    "blob", [memoryview(BLOB), bytearray(BLOB), memoryview(BLOB).cast("I")], ids=lambda b: str(type(b))
)
def test_any_buffer_is_saved(store: Store, blob: Any) -> None:
    saved(store, blob=blob)
    assert store.load(KEY) == BLOB


def test_an_empty_engine_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="at least one byte"):
        store.save(KEY, b"")


def test_files_are_written_in_pieces(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_CHUNK", 5)
    saved(store)
    assert store.load(KEY) == BLOB


@pytest.mark.parametrize(
    "folder", ["a b", "ü/ö/漢字", "-rf", "new\nline", "quote'\"", "%s{}", "*", "\udcff", "x" * 255]
)
def test_odd_folders(tmp_path: Path, folder: str) -> None:
    store = Store(tmp_path / folder)
    saved(store)
    assert store.load(KEY) == BLOB and [entry.key for entry in store.entries()] == [KEY]
    assert len(store.prune(0)) == 1 and store.entries() == ()


@pytest.mark.parametrize("folder", ["a\0b", "\ud800"])
def test_impossible_folders(folder: str) -> None:
    with pytest.raises(InvalidOptionError, match="cannot be a path"):
        Store(folder)


def _parts(content: bytes) -> tuple[int, int]:
    """Where the header and the engine begin."""
    (length,) = struct.unpack("<I", content[12:16])
    return 16, 16 + length


def test_every_flipped_bit_is_noticed(store: Store) -> None:
    path = saved(store, blob=bytes(64))
    content = path.read_bytes()
    header, engine = _parts(content)
    assert header < engine < len(content)
    for place in range(len(content)):
        for bit in (place % 8,) if place >= header else range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert store.load(KEY) is None, (place, bit)
            store.entries()  # whatever it says, it does not fail
    assert sum(store.reasons.values()) == 8 * header + len(content) - header
    assert store.reasons["absent"] == 0
    saved(store, blob=bytes(64))
    assert store.load(KEY) == bytes(64)


def test_every_truncation_is_noticed(store: Store) -> None:
    path = saved(store, blob=bytes(range(100)))
    content = path.read_bytes()
    header, engine = _parts(content)
    places = {0, 1, 7, 8, 9, 11, 12, 13, 15, header, header + 1, engine - 1, engine, engine + 1, len(content) - 1}
    for place in sorted(places):
        path.write_bytes(content[:place])
        refuses(store, "truncated")
        assert [entry.key for entry in store.entries()] == [None]
    for tail in (b"\0", content):
        path.write_bytes(content + tail)
        refuses(store, "corrupt")
    saved(store)
    assert store.load(KEY) == BLOB


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda c: b"\x80\x04." + c, "foreign"),  # a pickle
        (lambda c: b"vtrt" + c[4:], "foreign"),  # a bare engine
        (lambda c: bytes(len(c)), "foreign"),
        (lambda c: c[:8] + struct.pack("<I", 0) + c[12:], "version"),
        (lambda c: c[:8] + struct.pack("<I", stores.VERSION + 1) + c[12:], "version"),
        (lambda c: c[:12] + struct.pack("<I", 2**32 - 1) + c[16:], "corrupt"),
        (lambda c: c[:12] + struct.pack("<I", stores.MAX_HEADER) + c[16:], "truncated"),
        (lambda c: c[:12] + struct.pack("<I", 0) + c[16:], "corrupt"),
        (lambda c: c.replace(b'"bytes":768', b'"bytes":769'), "truncated"),
        (lambda c: c.replace(b'"bytes":768', b'"bytes":767'), "corrupt"),
        (lambda c: c.replace(b'"bytes":768', b'"bytes":1e9'), "corrupt"),
        (lambda c: c.replace(b'"layers":2', b'"layers":1'), "foreign"),
        (lambda c: c.replace(b'"layers":2', b'"layers":2 '), "corrupt"),
    ],
)
def test_foreign_files_are_refused_and_replaced(store: Store, change: Any, kind: str) -> None:
    path = saved(store)
    content = path.read_bytes()
    changed = change(content)
    assert changed != content
    path.write_bytes(changed)
    refuses(store, kind)
    assert path.name in store.notes[-1]
    saved(store)
    assert store.load(KEY) == BLOB


def test_white_space_is_a_change(store: Store) -> None:
    path = saved(store)
    content = path.read_bytes()
    header, engine = _parts(content)
    spaced = json.dumps(json.loads(content[header:engine])).encode()
    path.write_bytes(content[:12] + struct.pack("<I", len(spaced)) + spaced + content[engine:])
    refuses(store, "corrupt")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "bytes", "key", "ab" * 32]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "key", "sha256"]), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(header=JSON.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=60), blob=st.binary(max_size=20))
def test_random_headers(tmp_path_factory: pytest.TempPathFactory, header: bytes, blob: bytes) -> None:
    store = Store(tmp_path_factory.getbasetemp() / "random-headers")
    store.folder.mkdir(exist_ok=True)
    store.path(KEY).write_bytes(stores._PREFIX.pack(stores.MAGIC, stores.VERSION, len(header)) + header + blob)
    assert store.load(KEY) is None and sum(store.reasons.values()) == 1
    (entry,) = store.entries()
    assert entry.key is None and entry.reason


@settings(deadline=None, max_examples=100, derandomize=True)
@given(content=st.binary(max_size=64))
def test_random_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    store = Store(tmp_path_factory.getbasetemp() / "random-files")
    store.folder.mkdir(exist_ok=True)
    for start in (b"", stores.MAGIC, stores.MAGIC + struct.pack("<I", stores.VERSION)):
        store.path(KEY).write_bytes(start + content)
        assert store.load(KEY) is None
        assert [entry.key for entry in store.entries()] == [None]


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"bytes":' + b"9" * 5000 + b"}", b"\xff\xfe", b'"' + b"a" * 10**6]
)
def test_hostile_headers(store: Store, header: bytes) -> None:
    store.folder.mkdir()
    store.path(KEY).write_bytes(stores._PREFIX.pack(stores.MAGIC, stores.VERSION, len(header)) + header + BLOB)
    refuses(store, "corrupt")
    assert [entry.key for entry in store.entries()] == [None]


# --- what the disk may do


def test_a_folder_or_pipe_in_the_way(store: Store) -> None:
    store.folder.mkdir()
    store.path(KEY).mkdir()
    refuses(store, "unreadable")
    assert store.save(KEY, BLOB) is None and store.reasons["unwritable"] == 1
    assert [each.name for each in store.folder.iterdir()] == [store.path(KEY).name]
    assert store.entries() == ()
    store.path(KEY).rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(store.path(KEY))
        refuses(store, "unreadable")
        saved(store)
        assert store.load(KEY) == BLOB


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        store = Store(folder)
        refuses(store, "unreadable")
        assert store.save(KEY, BLOB) is None and store.reasons["unwritable"] == 1
        assert store.entries() == () and store.prune(0) == ()


def test_broken_links(store: Store, tmp_path: Path) -> None:
    store.folder.mkdir()
    store.path(KEY).symlink_to(tmp_path / "nowhere")
    refuses(store, "absent")
    saved(store)
    assert store.load(KEY) == BLOB and not store.path(KEY).is_symlink()


CODES = {"open": errno.EACCES, "write": errno.ENOSPC, "fsync": errno.EIO, "replace": errno.EROFS}


@pytest.mark.parametrize("call", CODES)
def test_a_disk_that_refuses(store: Store, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(store, blob=b"old")

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(CODES[call], "refused")

    with monkeypatch.context() as patch:
        patch.setattr(*{"write": (stores, "_write"), "replace": (Path, "replace")}.get(call, (os, call)), refuse)
        assert store.save(KEY, BLOB) is None
    assert store.reasons["unwritable"] == 1 and "refused" in store.notes[-1]
    assert [each.name for each in store.folder.iterdir()] == [store.path(KEY).name]
    assert store.load(KEY) == b"old"


def test_interrupted_writes_leave_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(KEY, BLOB)
    assert list(store.folder.iterdir()) == []


def _start(work: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """``work`` in a process of its own; forked, because importing torch takes seconds."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def _finish(process: multiprocessing.process.BaseProcess) -> None:
    process.join(timeout=60)
    assert process.exitcode == 0


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


@needs_fork
def test_a_full_disk(store: Store) -> None:
    import resource

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert store.save(KEY, bytes(1_000_000)) is None
        assert store.reasons == {"unwritable": 1} and "File too large" in store.notes[-1]
        assert store.load(KEY) == b"old"
        assert store.save(KEY, b"small") is not None

    saved(store, blob=b"old")
    _finish(_start(work))
    assert [each.name for each in store.folder.iterdir()] == [store.path(KEY).name]
    assert store.load(KEY) == b"small"


@needs_fork
def test_no_permission() -> None:
    def work(store: Store) -> None:
        if os.getuid() == 0:  # who may do everything
            os.setgid(65534)
            os.setuid(65534)
        assert store.save(KEY, b"new") is None and store.load(KEY) is None
        assert store.entries() == () and store.prune(0) == ()
        assert store.reasons.keys() == {"unwritable", "unreadable"}, store.notes

    # pytest's own folders are closed to other users
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        store = Store(Path(folder) / "engines")
        saved(store)
        store.folder.chmod(0)
        _finish(_start(work, store))
        store.folder.chmod(0o700)
        assert store.load(KEY) == BLOB


@needs_fork
def test_processes_at_once(store: Store) -> None:
    """Four writers and readers of the same key: everything read is one of the engines written, never a mixture."""
    blobs = [bytes([index]) * (200_000 + 1000 * index) for index in range(4)]

    def work(blob: bytes) -> None:
        for turn in range(25):
            assert store.save(KEY, blob) is not None, store.notes
            for _ in range(3):
                assert store.load(KEY) in blobs, store.notes
            if turn % 10 == 9:
                store.prune(10**9)
        assert not store.reasons, store.notes

    for process in [_start(work, blob) for blob in blobs]:
        _finish(process)
    assert [each.name for each in store.folder.iterdir()] == [store.path(KEY).name]
    assert store.load(KEY) in blobs


@needs_fork
def test_a_killed_writer_leaves_no_engine(store: Store) -> None:
    def work() -> None:
        os.fsync = lambda _: time.sleep(60)
        store.save(KEY, bytes(100_000))

    process = _start(work)
    until = time.monotonic() + 30
    while not store.folder.is_dir() or not any(path.stat().st_size for path in store.folder.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.join()
    (left,) = store.folder.iterdir()
    assert left.suffix == ".tmp" and store.entries() == ()
    refuses(store, "absent")
    saved(store)
    assert left.exists()  # it could be a living process's
    long_ago = time.time() - stores.STALE_SECONDS - 10
    os.utime(left, (long_ago, long_ago))
    saved(store)
    assert not left.exists() and store.load(KEY) == BLOB


# --- housekeeping


def _three(store: Store) -> list[Key]:
    keys = [dataclasses.replace(KEY, layers=layers) for layers in (1, 2, 3)]
    for age, key in enumerate(keys):
        path = saved(store, key, bytes([age]) * 1000)
        os.utime(path, (1e9 + age, 1e9 + age))
    return keys


def test_entries(store: Store) -> None:
    assert store.entries() == ()
    keys = _three(store)
    (store.folder / "notes.txt").write_text("not an engine")
    (store.folder / ("x" + stores.SUFFIX)).write_bytes(b"xfastTRT")
    entries = store.entries()
    assert [entry.name for entry in entries] == sorted([*(key.name for key in keys), "x"])
    by_name = {entry.name: entry for entry in entries}
    for age, key in enumerate(keys):
        entry = by_name[key.name]
        assert entry.key == key and entry.reason is None and entry.path == store.path(key)
        assert entry.bytes == entry.path.stat().st_size and entry.used == 1e9 + age
    assert by_name["x"].key is None and by_name["x"].reason


def test_prune_removes_the_least_recently_used(store: Store) -> None:
    keys = _three(store)
    size = max(entry.bytes for entry in store.entries())
    assert store.prune(10 * size) == ()
    assert store.load(keys[0]) is not None  # now the most recently used
    assert store.prune(2 * size) == (keys[1].name,)
    assert store.prune(size) == (keys[2].name,)
    assert store.prune(0) == (keys[0].name,)
    assert store.entries() == () and store.prune(0) == ()
    with pytest.raises(InvalidOptionError, match="max_bytes: -1"):
        store.prune(-1)


def test_prune_also_removes_damaged_files(store: Store) -> None:
    path = saved(store)
    path.write_bytes(b"damaged")
    assert store.prune(0) == (KEY.name,)
    assert not path.exists()


def test_prune_leaves_what_is_not_the_stores(store: Store) -> None:
    """TensorRT's own tools name their files like that, too."""
    saved(store)
    plan = store.folder / ("model" + stores.SUFFIX)
    plan.write_bytes(bytes(10_000))
    assert store.prune(5000) == () and store.prune(0) == (KEY.name,) and plan.exists()


def test_prune_can_leave_what_this_process_uses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = _three(store)
    monkeypatch.setattr(stores, "_held", set())
    assert store.load(keys[1]) is not None
    paths = {key: store.path(key) for key in keys}
    os.utime(paths[keys[1]], (1e8, 1e8))  # the least recently used: another process's clock may be late
    size = max(entry.bytes for entry in store.entries())
    assert Store(store.folder).prune(2 * size, held=False) == (keys[0].name,)
    assert store.prune(0, held=False) == (keys[2].name,) and paths[keys[1]].exists()
    other = dataclasses.replace(KEY, layers=4)
    saved(store, other)
    assert store.prune(0, held=False) == ()
    assert set(store.prune(0)) == {keys[1].name, other.name}


def test_the_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XFAST_CACHE_BYTES", raising=False)
    assert stores.size_limit() == stores.DEFAULT_BYTES == 32 * 2**30
    for value, size in (("", stores.DEFAULT_BYTES), ("0", 0), ("1000", 1000)):
        monkeypatch.setenv("XFAST_CACHE_BYTES", value)
        assert stores.size_limit() == size
    for wrong in ("-1", "1e9", "20 GiB", "\u0663"):
        monkeypatch.setenv("XFAST_CACHE_BYTES", wrong)
        with pytest.raises(InvalidOptionError, match=r"XFAST_CACHE_BYTES: .* a number of bytes"):
            stores.size_limit()


# --- the default folder


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XFAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / "home" / ".cache" / "xfast" / "tensorrt"
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_folder() == tmp_path / "home" / ".cache" / "xfast" / "tensorrt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "xfast" / "tensorrt"
    monkeypatch.setenv("XFAST_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine" == Store().folder
    assert not (tmp_path / "mine").exists()  # until something is saved


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XFAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InvalidOptionError, match="XFAST_CACHE"):
        Store()
