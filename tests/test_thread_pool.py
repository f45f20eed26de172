"""Threads: they never change a result, calls from several threads agree, and a fork after use works."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from reference import assert_same_bits

import xfast
from xfast import _C
from xfast.threads import num_threads

PRECISIONS = ("fp32", "bf16", "int8", "int4")
THREADS = (2, 3, 5, 8)
VOCAB, PAD = 60, 1
# Up to 112 packed tokens the outputs are split between threads, above that the tokens (csrc/forward.h).
BATCHES = {"one token": [1], "few": [9, 30, 1, 0, 17], "112": [112], "113": [100, 13], "many": [140, 3, 90, 61, 1, 25]}


@pytest.fixture(autouse=True)
def _default_threads() -> Iterator[None]:
    # Torch on one thread: its idle OpenMP threads would spin against the pool under test.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    xfast.set_num_threads(None)
    torch.set_num_threads(before)


def make_model(hidden: int, heads: int) -> transformers.XLMRobertaModel:
    config = transformers.XLMRobertaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=3 * hidden + 5,
        hidden_act="gelu",
        max_position_embeddings=300,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.XLMRobertaModel(config, add_pooling_layer=False).eval()


def make_batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random ids, right-padded."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.randint(2, VOCAB, (n,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def run(model: transformers.XLMRobertaModel, batch: dict[str, torch.Tensor], threads: int | None = None) -> np.ndarray:
    if threads is not None:
        xfast.set_num_threads(threads)
    return model(**batch).last_hidden_state.numpy()


@pytest.mark.parametrize("precision", PRECISIONS)
# Heads of whole 32-column panels (split by head), heads that straddle panels, and fewer heads than threads.
@pytest.mark.parametrize(("hidden", "heads"), [(96, 3), (40, 5), (64, 1)])
def test_the_number_of_threads_changes_nothing(precision: str, hidden: int, heads: int) -> None:
    model = xfast.accelerate(make_model(hidden, heads), precision=precision)
    for name, lengths in BATCHES.items():
        batch = make_batch(lengths)
        want = run(model, batch, 1)
        assert np.isfinite(want).all() and want.any()
        for threads in THREADS:
            assert_same_bits(run(model, batch, threads), want, f"{name}, {threads} threads")
    assert not xfast.explain(model).encoders[0].fallbacks, "these calls tested the original code"


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_number_of_threads_changes_no_selected_row_and_no_hidden_state(precision: str, pre_norm: bool) -> None:
    spec = {"layers": 2, "hidden": 40, "heads": 5, "head_dim": 8, "intermediate": 70}
    encoder = native_encoder(spec, precision, pre_norm=pre_norm)
    for lengths in ([3, 1, 40, 8], [120, 1, 9, 90]):
        total = sum(lengths)
        cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
        ids, positions = (np.arange(total) % 7).astype(np.int32), (np.arange(total) % 300).astype(np.int32)
        results = []
        for threads in (1, *THREADS):
            first = np.full((len(lengths), 40), np.nan, np.float32)
            encoder.forward(ids, None, positions, None, cu_seqlens, cu_seqlens[:-1], 2, first, None, threads)
            last = np.full((total, 40), np.nan, np.float32)
            states = np.full((3, total, 40), np.nan, np.float32)
            encoder.forward(ids, None, positions, None, cu_seqlens, None, 2, last, states, threads)
            results.append((first, last, states))
            assert_same_bits(states[2], last)
            assert_same_bits(first, last[cu_seqlens[:-1]], f"selected rows, {threads} threads")
        for threads, got in zip(THREADS, results[1:], strict=True):
            for one, other in zip(results[0], got, strict=True):
                assert_same_bits(other, one, f"{threads} threads")


def native_encoder(sizes: dict[str, int], precision: str, threads: int = 2, *, pre_norm: bool = False) -> _C.Encoder:
    """An _C.Encoder with random weights: vocab 7, 300 positions, one type."""
    rng = np.random.default_rng(0)
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    shape = {**sizes, "vocab": 7, "positions": 300, "types": 1, "eps": 1e-5, "pre_norm": pre_norm}
    encoder = _C.Encoder(shape, precision, "auto")
    encoder.set_tables(*(rng.standard_normal((n, hidden)).astype(np.float32) for n in (7, 300, 1)))
    norms = [(0, "final_norm" if pre_norm else "embedding_norm")]
    linears = {"qkv": (3 * hidden, hidden), "attention_out": (hidden, hidden)}
    linears |= {"ffn_in": (inner, hidden), "ffn_out": (hidden, inner)}
    for layer in range(sizes["layers"]):
        norms += [(layer, "attention_norm"), (layer, "ffn_norm")]
        for name, dims in linears.items():
            weight = (rng.standard_normal(dims) / dims[1] ** 0.5).astype(np.float32)
            bias = rng.standard_normal(dims[0]).astype(np.float32)
            assert encoder.set_linear(layer, name, 0, weight, bias, threads)
    for layer, name in norms:
        encoder.set_norm(layer, name, *(rng.standard_normal(hidden).astype(np.float32) for _ in range(2)))
    return encoder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packing_with_several_threads_gives_the_same_weights(precision: str) -> None:
    sizes = {"layers": 1, "hidden": 104, "heads": 2, "head_dim": 52, "intermediate": 70}
    ids, cu_seqlens = (np.arange(20) % 7).astype(np.int32), np.array([0, 20], np.int32)
    outputs = []
    for threads in (1, *THREADS):
        encoder = native_encoder(sizes, precision, threads)
        outputs.append(np.full((20, 104), np.nan, np.float32))
        encoder.forward(ids, None, ids, None, cu_seqlens, None, 1, outputs[-1], None, 1)
    for threads, got in zip(THREADS, outputs[1:], strict=True):
        assert_same_bits(got, outputs[0], f"{threads} threads")


@pytest.mark.parametrize("threads", [*THREADS, 17])
def test_all_finite_sees_every_value_with_any_number_of_threads(threads: int) -> None:
    values = np.ones(20_011, np.float32)
    assert _C.all_finite(values, threads)
    for at in (0, 4096, 10_005, 10_006, 20_010):
        values[at] = np.nan
        assert not _C.all_finite(values, threads), at
        values[at] = 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_calls_from_several_threads_agree_with_one_after_another(precision: str) -> None:
    model = xfast.accelerate(make_model(96, 3), precision=precision)
    batches = [make_batch(lengths) for lengths in BATCHES.values()] * 6
    xfast.set_num_threads(3)
    want = [run(model, batch) for batch in batches]

    def call(batch: dict[str, torch.Tensor]) -> np.ndarray:
        with torch.inference_mode():  # the mode belongs to a thread
            return run(model, batch)

    with ThreadPoolExecutor(4) as executor:
        for got, expected in zip(executor.map(call, batches), want, strict=True):
            assert_same_bits(got, expected)


def test_alerted_threads_are_ready_and_go_back_to_sleep() -> None:
    model, batch = xfast.accelerate(make_model(64, 2), precision="int8"), make_batch([40, 60])
    want = model(**batch)[0]
    for wanted in (0, -1, 1, 2, 300):  # nothing asks for more threads than there are
        _C.alert_workers(wanted)
    for pause in (0.0, 0.005):  # alerted ones stay awake for a millisecond
        for _ in range(3):
            _C.alert_workers(2)
            time.sleep(pause)
            assert_same_bits(model(**batch)[0].numpy(), want.numpy())
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1, "threads spin although nothing was asked of them"


def test_two_models_in_two_threads_do_not_disturb_each_other() -> None:
    models = [xfast.accelerate(make_model(96, 3), precision=p) for p in ("fp32", "int8")]
    batch = make_batch(BATCHES["many"])
    xfast.set_num_threads(2)
    want = [run(model, batch) for model in models]

    def work(which: int) -> None:
        for _ in range(20):
            assert_same_bits(run(models[which], batch), want[which], f"model {which}")

    at_once(work, 2)


def at_once(work: Callable[[int], None], count: int, timeout: float = 60.0) -> None:
    """Runs ``work(0)``, ``work(1)``, ... in threads of their own and expects all of them to end well."""
    failures: list[BaseException] = []

    def body(which: int) -> None:
        try:
            with torch.inference_mode():  # the mode belongs to a thread
                work(which)
        except BaseException as error:  # a thread's exception would otherwise be lost
            failures.append(error)

    workers = [threading.Thread(target=body, args=(which,)) for which in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout)
        assert not worker.is_alive(), "the calls wait for one another"
    assert not failures


def in_child(action: Callable[[], bool], timeout: float = 60.0) -> None:
    """Forks, runs ``action`` in the child and expects True of it."""

    def body() -> None:
        raise SystemExit(0 if action() else 7)

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join(timeout)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive, "the forked child hangs"
    assert child.exitcode == 0, f"the forked child ended with {child.exitcode}"


def test_fork_after_use() -> None:
    model = xfast.accelerate(make_model(96, 3), precision="int8")
    batch = make_batch(BATCHES["many"])
    want = run(model, batch, 3)

    def action() -> bool:
        return all(np.array_equal(run(model, batch, threads), want) for threads in (3, 1, 5))

    def grandchild() -> bool:
        in_child(action)
        return action()

    in_child(action)
    in_child(grandchild)
    assert_same_bits(run(model, batch, 3), want, "the parent, afterwards")


def test_fork_while_another_thread_computes() -> None:
    encoder = native_encoder({"layers": 2, "hidden": 40, "heads": 5, "head_dim": 8, "intermediate": 70}, "int8")
    ids = (np.arange(200) % 7).astype(np.int32)
    positions, cu_seqlens = np.arange(200, dtype=np.int32), np.array([0, 60, 200], np.int32)

    def forward() -> np.ndarray:
        out = np.full((200, 40), np.nan, np.float32)
        encoder.forward(ids, None, positions, None, cu_seqlens, None, 2, out, None, 2)
        return out

    want, stop, calls = forward(), threading.Event(), [0]

    def keep_busy() -> None:
        while not stop.is_set():
            forward()
            calls[0] += 1

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(5):
            in_child(lambda: np.array_equal(forward(), want))
            time.sleep(0.002)
    finally:
        stop.set()
        busy.join(60)
    assert not busy.is_alive() and calls[0] > 0
    assert_same_bits(forward(), want)


@pytest.mark.parametrize("threads", [0, -1, True, False, 2.0, "2", _C.max_threads + 1, 10**6, 2**63, 2**70])
def test_a_number_of_threads_that_makes_no_sense_is_refused(threads: object) -> None:
    xfast.set_num_threads(2)
    with pytest.raises(xfast.InvalidOptionError, match=r"^threads: "):
        xfast.set_num_threads(threads)
    assert xfast.get_num_threads() == 2, "a refused value changes nothing"


def test_the_default_follows_torch() -> None:
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert xfast.get_num_threads() == threads
        xfast.set_num_threads(5)
        assert xfast.get_num_threads() == 5
        xfast.set_num_threads(None)
        assert xfast.get_num_threads() == threads
    xfast.set_num_threads(_C.max_threads)
    assert xfast.get_num_threads() == _C.max_threads


OUT_OF_MEMORY = """
import resource
import numpy as np
from xfast import _C
from xfast.threads import num_threads
names = ("layers", "hidden", "heads", "head_dim", "intermediate", "vocab", "positions", "types", "eps", "pre_norm")
depth = 1 << 16
encoder = _C.Encoder(dict(zip(names, (1, 16, 1, 16, depth, 8, 8, 1, 1e-5, False))), "fp32", "auto")
weight = np.ones((16, depth), np.float32)
assert encoder.set_linear(0, "ffn_out", 0, weight, None, 1)
assert encoder.set_linear(0, "ffn_in", 0, np.ones((2, 16), np.float32), None, 4)  # starts the threads
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1 << 20)
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
for _ in range(3):
    try:
        encoder.set_linear(0, "ffn_out", 0, weight, None, 64)  # 16 MB
        print("taken")
    except MemoryError:
        print("refused")
resource.setrlimit(resource.RLIMIT_AS, before)
assert encoder.set_linear(0, "ffn_out", 0, weight, None, 4)
"""


def test_no_memory_to_work_in_is_an_error_and_no_crash(tmp_path: Path) -> None:
    done = subprocess.run(  # elsewhere: in a checkout `xfast` would be its sources
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.split()) == (0, ["refused"] * 3), done.stderr


@pytest.mark.parametrize("earlier", [None, 3])
def test_threads_of_a_block_are_put_back(earlier: int | None) -> None:
    xfast.set_num_threads(earlier)
    torchs, ours = torch.get_num_threads(), xfast.get_num_threads()
    with num_threads(torchs + 1):
        assert torch.get_num_threads() == xfast.get_num_threads() == torchs + 1
    assert (torch.get_num_threads(), xfast.get_num_threads()) == (torchs, ours)
    with num_threads(None):
        assert (torch.get_num_threads(), xfast.get_num_threads()) == (torchs, ours)
