"""The native boundary under fuzzing: whatever it is given, it answers rightly or raises; it never crashes.

Calls start from valid arguments, of which up to two are replaced by something strange. An answer is compared with
plain NumPy or torch wherever that is possible.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import reference
import torch
from fuzz import FUZZ, INTEGERS, STRANGE, arrays, attempt, disturbed, threads_of
from hypothesis import given
from hypothesis import strategies as st

from xfast import _C


@FUZZ
@given(data=st.data())
def test_all_finite(data: st.DataObject) -> None:
    values = data.draw(STRANGE)
    threads = threads_of(data.draw(st.sampled_from(INTEGERS)))
    answer = attempt(_C.all_finite, values, threads)
    if answer is None:
        return
    values = values.view(np.uint16) if values.dtype.kind == "u" else values
    wide = torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy() if values.dtype.kind == "u" else values
    assert answer == bool(np.isfinite(wide).all())


@st.composite
def unpad_arguments(draw: st.DrawFn) -> dict[str, Any]:
    batch, length = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    cells = batch * length

    def table(low: int, high: int, rows: int = batch) -> np.ndarray:
        flat = draw(st.lists(st.integers(low, high), min_size=rows * length, max_size=rows * length))
        return np.array(flat, np.int64).reshape(rows, length)

    mask = np.array(draw(st.lists(st.sampled_from([0, 1]), min_size=cells, max_size=cells))).reshape(batch, length)
    return {
        "batch": batch,
        "length": length,
        "ids": table(0, 5) if draw(st.booleans()) else None,
        "mask": mask.astype(draw(st.sampled_from(["i8", "i4", "u1", "?", "f4"]))) if draw(st.booleans()) else None,
        "position_ids": table(0, 9, draw(st.sampled_from([1, batch]))) if draw(st.booleans()) else None,
        "type_ids": table(-1, 2) if draw(st.booleans()) else None,
        "vocab": draw(st.sampled_from([5, 6])),
        "positions": draw(st.sampled_from([4, 10])),
        "types": draw(st.sampled_from([2, 3])),
        "padding_idx": draw(st.sampled_from([-1, 0, 1])),
    }


def expected_unpad(a: dict[str, Any]) -> reference.Unpadded | None:
    """The right answer to accepted arguments, or None when one of the values is outside its range."""
    shape, padding_idx = (int(a["batch"]), int(a["length"])), int(a["padding_idx"])
    pad_id = padding_idx if padding_idx >= 0 else None
    ids, positions, types = (
        None if a[name] is None else torch.from_numpy(a[name].copy()).expand(shape)
        for name in ("ids", "position_ids", "type_ids")
    )
    mask = None if a["mask"] is None else torch.from_numpy(a["mask"].astype(np.float64))
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        return None
    if positions is None:
        positions = reference.position_rule(shape, ids, pad_id)
    for values, size in ((ids, a["vocab"]), (types, a["types"]), (positions, a["positions"])):
        if values is not None and values.numel() and not 0 <= int(values.min()) <= int(values.max()) < int(size):
            return None
    return reference.unpad(shape, ids, mask, positions, types, pad_id)


@FUZZ
@given(data=st.data())
def test_unpad(data: st.DataObject) -> None:
    arguments = data.draw(unpad_arguments().flatmap(disturbed))
    answer = attempt(_C.unpad, *arguments.values())
    if answer is None:
        return
    wanted = expected_unpad(arguments)
    if wanted is None:
        row, column = answer["at"]
        assert answer["error"] and 0 <= row < int(arguments["batch"]) and 0 <= column < int(arguments["length"])
        return
    assert answer["error"] == ""
    for name in ("ids", "position_ids", "type_ids", "indices", "cu_seqlens"):
        if getattr(wanted, name) is not None:
            assert answer[name].tolist() == getattr(wanted, name).tolist(), name


@FUZZ
@given(data=st.data())
def test_pad(data: st.DataObject) -> None:
    total, cols, slots = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 8))
    indices = sorted(data.draw(st.lists(st.integers(0, 8), min_size=total, max_size=total)))
    arguments = {
        "packed": np.arange(total * cols, dtype=np.float32).reshape(total, cols),
        "indices": np.array(indices, np.int32),
        "out": np.full((slots, cols), np.nan, np.float32),
        "threads": data.draw(st.sampled_from([1, 2, 3])),
    }
    arguments = data.draw(disturbed(arguments))
    packed, indices, out = (arguments[name] for name in ("packed", "indices", "out"))
    before = packed.copy() if isinstance(packed, np.ndarray) else None
    if attempt(lambda: _C.pad(packed, indices, out, threads_of(arguments["threads"])) or True):
        want = np.zeros(out.shape, np.float32)
        want[indices] = before
        np.testing.assert_array_equal(out, want)


@FUZZ
@given(data=st.data())
def test_watch(data: st.DataObject) -> None:
    watched = data.draw(st.one_of(STRANGE, st.lists(STRANGE, max_size=4), st.lists(arrays(), max_size=4)))
    objects = data.draw(st.lists(STRANGE, max_size=3))
    dicts = data.draw(st.one_of(st.just([{"a": watched}]), STRANGE, st.lists(STRANGE, max_size=3)))
    lines = [(id(watched), 64, 0), (0, 64, 0), (2**63, 4096, 0)]  # nothing is read through these
    probe = attempt(_C.Watch, dicts, objects, [{}], [], [], watched, lines)
    if probe is None:
        return
    assert probe.changed() is False
    numbers = [a for a in watched if isinstance(a, np.ndarray) and a.dtype.kind in "iuf"]
    big = [a for a in numbers if a.nbytes >= 8 and a.flags.writeable]
    if big:
        big[0].reshape(-1).view(np.uint8)[0] ^= 0xFF
        assert probe.changed() is True


def as_f32(value: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(value, dtype=np.float32))


@FUZZ
@given(data=st.data())
def test_linear(data: st.DataObject) -> None:
    rows, n_in, n_out = (data.draw(st.integers(0, 4)) for _ in range(3))
    epilogue = data.draw(st.sampled_from(["bias", "gelu", "residual"]))
    given_ = {
        "precision": data.draw(st.sampled_from(["fp32", "bf16", "int8", "int4"])),
        "weight": np.ones((n_out, n_in), np.float32),
        "bias": np.ones(n_out, np.float32) if data.draw(st.booleans()) else None,
        "group": data.draw(st.sampled_from([32, 64, 128])),
        "divisor": data.draw(st.sampled_from([None, np.full(n_in, 4, np.float32)])),
        "isa": data.draw(st.sampled_from(_C.available_isas())),
        "x": np.full((rows, n_in), 2, np.float32),
        "epilogue": epilogue,
        "residual": np.ones((rows, n_out), np.float32) if epilogue == "residual" else None,
    }
    a = data.draw(disturbed(given_))
    linear = attempt(_C.kernels.Linear, a["precision"], a["weight"], a["bias"], a["group"], a["divisor"])
    if linear is None:
        return
    answer = attempt(linear.multiply, a["isa"], a["x"], a["epilogue"], a["residual"])
    if answer is None:
        return
    x = as_f32(a["x"])
    assert answer.shape == (x.shape[0], a["weight"].shape[0])
    plain = _C.kernels.Linear(a["precision"], a["weight"].copy(), a["bias"], a["group"], a["divisor"])
    residual = None if a["residual"] is None else as_f32(a["residual"])
    np.testing.assert_array_equal(answer, plain.multiply(a["isa"], x, a["epilogue"], residual))


@FUZZ
@given(data=st.data())
def test_quantize_and_norm(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 20))
    x, vector = np.full((rows, cols), 3, np.float32), np.ones(cols, np.float32)
    a = data.draw(disturbed({"isa": "auto", "x": x, "gamma": vector, "beta": vector, "eps": 1e-5}))
    answer = attempt(_C.kernels.quantize, a["isa"], a["x"])
    if answer is not None:
        q, scale = reference.quantize_rows(torch.from_numpy(as_f32(a["x"]).copy()).nan_to_num(0, 3e38, -3e38))
        assert answer[0].shape == q.shape and answer[1].shape == scale.shape
        if np.isfinite(as_f32(a["x"])).all():
            np.testing.assert_array_equal(answer[0], q.numpy())
    answer = attempt(_C.kernels.layer_norm, *a.values())
    if answer is not None:
        plain = [as_f32(a[name]) for name in ("x", "gamma", "beta")]
        np.testing.assert_array_equal(answer, _C.kernels.layer_norm("portable", *plain, a["eps"]))


@FUZZ
@given(data=st.data())
def test_attention(data: st.DataObject) -> None:
    queries, keys, heads, head_dim = (data.draw(st.integers(0, 3)) for _ in range(4))
    q, k = np.ones((queries, heads, head_dim), np.float32), np.ones((keys, heads, head_dim), np.float32)
    a = data.draw(disturbed({"isa": "auto", "q": q, "k": k, "v": k * 5, "scale": 0.5}))
    int16 = data.draw(st.booleans())
    answer = attempt(_C.kernels.attention, *a.values(), int16)
    if answer is None:
        return
    plain = [as_f32(a[name]) for name in ("q", "k", "v")]
    assert answer.shape == plain[0].shape
    small = all(np.isfinite(p).all() and (np.abs(p) < 100).all() for p in plain) and abs(a["scale"]) < 100
    if small and int16 and len(plain[1]):
        assert not answer.size or np.abs(answer).max() <= np.abs(plain[2]).max() * (1 + 1e-5)
    elif small:  # no keys: the mean of nothing is taken as zeros
        want = reference.attention(*map(torch.from_numpy, plain), float(a["scale"])).nan_to_num(0).numpy()
        np.testing.assert_allclose(answer, want if len(plain[1]) else np.zeros(answer.shape), rtol=1e-5, atol=1e-5)


@FUZZ
@given(data=st.data())
def test_embed(data: st.DataObject) -> None:
    cols, tokens = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 4))
    table = np.arange(3 * cols, dtype=np.float32).reshape(3, cols)
    ids = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=tokens, max_size=tokens)), np.int32)
    fine = np.clip(ids, 0, 2)
    given_ = {"isa": "auto", "word": table, "position": table, "type": table, "ids": ids, "position_ids": fine}
    a = data.draw(disturbed({**given_, "type_ids": fine}))
    answer = attempt(_C.kernels.embed, *a.values())
    if answer is None:
        return
    tables = [
        torch.from_numpy(t.copy()).view(torch.bfloat16) if t.dtype.kind == "u" else torch.from_numpy(as_f32(t))
        for t in (a[name] for name in ("word", "position", "type"))
    ]
    indices = [torch.from_numpy(np.asarray(a[name]).astype(np.int64)) for name in ("ids", "position_ids", "type_ids")]
    np.testing.assert_array_equal(answer, reference.embed(*tables, *indices).numpy())


@FUZZ
@given(data=st.data())
def test_lm_head(data: st.DataObject) -> None:
    tokens, hidden, vocab = (data.draw(st.integers(0, 4)) for _ in range(3))
    vector = np.full(hidden, 0.5, np.float32)
    a = {
        "isa": data.draw(st.sampled_from(_C.available_isas())),
        "precision": data.draw(st.sampled_from(["fp32", "bf16"])),
        "x": np.arange(tokens * hidden, dtype=np.float32).reshape(tokens, hidden),
        "dense": np.eye(hidden, dtype=np.float32),
        "dense_bias": vector,
        "gamma": vector,
        "beta": vector,
        "eps": 1e-5,
        "decoder": np.ones((vocab, hidden), np.float32),
        "decoder_bias": data.draw(st.sampled_from([None, np.arange(vocab, dtype=np.float32)])),
        "indices": np.arange(tokens, dtype=np.int32) * data.draw(st.sampled_from([1, 2])),
        "out": np.full((2 * tokens, vocab), 7, data.draw(st.sampled_from(["f4", "u2"]))),
        "threads": data.draw(st.sampled_from([1, 2, 3])),
    }
    a = data.draw(disturbed(a))
    a["threads"] = threads_of(a["threads"])
    if attempt(lambda: _C.lm_head(*a.values()) or True) is None:
        return
    out, indices = a["out"].copy(), a["indices"].copy()
    assert not np.delete(out, indices, axis=0).any()
    # Once more, from arrays that lie plainly in memory
    again = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in a.items()}
    again["out"][:] = 9
    _C.lm_head(*again.values())
    np.testing.assert_array_equal(again["out"], out)


SHAPE = {"layers": 1, "hidden": 8, "heads": 2, "head_dim": 4, "intermediate": 6, "vocab": 4, "positions": 6, "types": 2}
SHAPE |= {"eps": 1, "pre_norm": False}
LINEARS = {"qkv": (24, 8), "attention_out": (8, 8), "ffn_in": (6, 8), "ffn_out": (8, 6)}
NORMS = ("embedding_norm", "final_norm", "attention_norm", "ffn_norm")


@FUZZ
@given(data=st.data())
def test_encoder_shape(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(SHAPE)), max_size=2, unique=True))
    small = st.one_of(STRANGE, st.integers(-1, 9)).filter(lambda v: not (isinstance(v, int) and 10 < v < 2**31))
    shape = {**SHAPE, **{key: data.draw(small) for key in keys}}
    if isinstance(shape["layers"], int) and shape["layers"] > 9:
        shape["layers"] = 9  # any number of layers is fine as long as there is memory: see test_extreme_sizes
    for key in data.draw(st.lists(st.sampled_from(sorted(SHAPE)), max_size=1)):
        del shape[key]
    a = data.draw(disturbed({"shape": shape, "precision": "int8", "isa": "auto"}))
    encoder = attempt(_C.Encoder, *a.values())
    if encoder is not None:
        assert encoder.isa in _C.available_isas() and encoder.packed_bytes >= 0


def fresh_encoder(pre_norm: bool = False) -> _C.Encoder:
    return _C.Encoder({**SHAPE, "pre_norm": pre_norm}, "int8", "auto")


@FUZZ
@given(data=st.data())
def test_choosing_formats(data: st.DataObject) -> None:
    encoder = fresh_encoder(data.draw(st.booleans()))
    for name, (rows, cols) in LINEARS.items():
        precision = data.draw(st.sampled_from(["fp32", "bf16", "int8", "int4"]))
        a = {"layer": 0, "name": name, "precision": precision, "group": data.draw(st.sampled_from([32, 64, 128]))}
        a["divisor"] = data.draw(st.sampled_from([None, np.full(cols, 2, np.float32)]))
        a = data.draw(disturbed(a))
        if attempt(lambda a=a: encoder.choose(*a.values()) or True) and a["divisor"] is not None:
            assert a["precision"] in ("int8", "int4") and a["divisor"].shape == (LINEARS[a["name"]][1],)
        attempt(encoder.set_linear, 0, name, 0, np.ones((rows, cols), np.float32), None, 1)
        with pytest.raises(ValueError, match="weights already"):
            encoder.choose(0, name, "int8", 64, None)


@FUZZ
@given(data=st.data())
def test_encoder_weights(data: st.DataObject) -> None:
    encoder, chosen = fresh_encoder(data.draw(st.booleans())), data.draw(st.sampled_from([None, *LINEARS]))
    for name, (rows, cols) in LINEARS.items():
        a = {"layer": 0, "name": name, "first": 0, "weight": np.ones((rows, cols), np.float32)}
        a |= {"bias": np.ones(rows, np.float32), "threads": 2}
        if name == chosen:
            a = data.draw(disturbed({**a, "first": data.draw(st.integers(-1, rows + 1))}))
            a["threads"] = threads_of(a["threads"])
        answer = attempt(encoder.set_linear, *a.values())
        if answer is not None:
            weight, bias, (outputs, inputs) = a["weight"], a["bias"], LINEARS[a["name"]]
            assert weight.shape[1] == inputs and 0 <= int(a["first"]) <= outputs - len(weight)
            assert answer == (_C.all_finite(weight, 1) and (bias is None or _C.all_finite(bias, 1)))
    vector = np.ones(8, np.float32)
    a = data.draw(disturbed({"layer": 0, "name": data.draw(st.sampled_from(NORMS)), "gamma": vector, "beta": vector}))
    attempt(encoder.set_norm, *a.values())
    tables = {name: np.ones((n, 8), np.float32) for name, n in (("word", 4), ("position", 6), ("type", 2))}
    a = data.draw(disturbed(tables))
    attempt(encoder.set_tables, *a.values())
    # However much of it was accepted, the encoder knows whether it is complete.
    out, zero = np.full((1, 8), np.nan, np.float32), np.zeros(1, np.int32)
    args = (zero, None, zero, None, np.array([0, 1], np.int32), None, 1, out, None, 1)
    if attempt(lambda: encoder.forward(*args) or True) is None:
        assert np.isnan(out).all()


def complete_encoder(pre_norm: bool, mixed: bool) -> _C.Encoder:
    encoder, rng = fresh_encoder(pre_norm), np.random.default_rng(0)
    if mixed:
        for name, precision, group in (("qkv", "int4", 32), ("ffn_in", "bf16", 64), ("ffn_out", "int4", 128)):
            divisor = np.full(LINEARS[name][1], 2, np.float32) if precision == "int4" else None
            encoder.choose(0, name, precision, group, divisor)
    encoder.set_tables(*(rng.standard_normal((n, 8)).astype(np.float32) for n in (4, 6, 2)))
    for name, dims in LINEARS.items():
        encoder.set_linear(0, name, 0, rng.standard_normal(dims).astype(np.float32), None, 1)
    for name in ("final_norm" if pre_norm else "embedding_norm", "attention_norm", "ffn_norm"):
        encoder.set_norm(0, name, np.ones(8, np.float32), np.zeros(8, np.float32))
    return encoder


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_that_are_refused_leave_nothing_usable(part: str) -> None:
    """Not the former ones either."""
    encoder, given = (
        complete_encoder(False, False),
        {"weight": np.ones((24, 8), np.float32), "bias": np.ones(24, np.float32)},
    )
    given[part].flat[3] = np.nan
    assert encoder.set_linear(0, "qkv", 0, given["weight"], given["bias"], 1) is False
    zero = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="weights are missing"):
        encoder.forward(
            zero, None, zero, None, np.array([0, 1], np.int32), None, 1, np.ones((1, 8), np.float32), None, 1
        )


ENCODERS = [complete_encoder(pre_norm, mixed) for pre_norm in (False, True) for mixed in (False, True)]
IDS, TYPES, ENDS = (np.array(v, np.int32) for v in ([3, 1, 0, 2, 2], [0, 1, 1, 0, 0], [0, 3, 3, 5]))


@FUZZ
@given(data=st.data())
def test_forward(data: st.DataObject) -> None:
    encoder = data.draw(st.sampled_from(ENCODERS))
    rows = data.draw(st.sampled_from([None, np.array([0, 4], np.int32), np.array([], np.int32)]))
    layers = data.draw(st.sampled_from([0, 1]))
    count = 5 if rows is None else len(rows)
    arguments = {
        "ids": IDS,
        "embeds": None,
        "position_ids": IDS,
        "type_ids": data.draw(st.sampled_from([TYPES, None])),
        "cu_seqlens": ENDS,
        "rows": rows,
        "layers": layers,
        "out": np.full((count, 8), np.nan, np.float32),
        "hidden_states": np.full((layers + 1, 5, 8), np.nan, np.float32) if rows is None else None,
        "threads": data.draw(st.sampled_from([1, 2, 3])),
    }
    a = data.draw(disturbed(arguments))
    a["threads"] = threads_of(a["threads"])
    if not attempt(lambda: encoder.forward(*a.values()) or True):
        return
    plain = np.full((len(a["position_ids"]), 8), np.nan, np.float32)
    words = [a["ids"], a["embeds"], a["position_ids"], a["type_ids"], a["cu_seqlens"]]
    encoder.forward(*words, None, a["layers"], plain, None, 1)
    np.testing.assert_array_equal(a["out"], plain if a["rows"] is None else plain[a["rows"]])
    if a["hidden_states"] is not None:
        np.testing.assert_array_equal(a["hidden_states"][-1], plain)


# Each in a process of its own with little memory, so that a crash fails one test and not the whole run.
EXTREME = {
    "rows beyond 2^63": "e = encoder(); e.set_linear(0, 'qkv', 2**63 - 1, f32(1, 8), f32(1), 1)",
    "rows end at 2^63": "e = encoder(); e.set_linear(0, 'qkv', 2**63 - 24, f32(24, 8), f32(24), 1)",
    "weights beyond 2^63 bytes": "encoder(hidden=2**30, heads=2**30, head_dim=1)",
    "weights beyond 2^64 bytes": "encoder(hidden=2**31 - 1, heads=2**31 - 1, head_dim=1)",
    "weights beyond the memory": "encoder(hidden=2**20, heads=2**20, head_dim=1)",
    "wide feed-forward": "encoder(intermediate=2**31 - 1)",
    "layers beyond the memory": "encoder(layers=2**62)",
    "no keys": "a = kernels.attention('auto', f32(2, 1, 3), f32(0, 1, 3), f32(0, 1, 3), 1.0); assert not a.any(), a",
    "keys 0-D": "kernels.attention('auto', f32(1, 1, 1), f32(), f32(1, 1, 1), 1.0)",
    "batch beyond the memory": "unpad(2**31, 0, None, None, None, None, 1, 1, 1, -1)",
    "one long row": "unpad(1, 2**31 - 1, None, None, None, None, 1, 8, 1, -1)",
    "many threads": "assert all_finite(f32(1 << 20), 2**31 - 1)",
}
CHILD = """
import importlib.util, resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
shape = dict(layers=1, hidden=8, heads=2, head_dim=4, intermediate=6, vocab=4, positions=6, types=2, eps=1.0)
shape["pre_norm"] = True
f32 = lambda *sizes: np.ones(sizes, np.float32)
names = {"encoder": lambda **sizes: module.Encoder({**shape, **sizes}, "fp32", "auto"), "f32": f32}
try:
    exec(sys.argv[2], {**vars(module), **names})
except (ValueError, TypeError, RuntimeError, MemoryError) as error:
    print("refused:", error)
print("survived")
"""


@pytest.mark.parametrize("case", EXTREME)
def test_extreme_sizes(case: str) -> None:
    command = [sys.executable, "-c", CHILD, _C.__file__, EXTREME[case]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "survived" in done.stdout, f"{done.returncode}: {done.stdout}{done.stderr}"
    must_refuse = "beyond" in case or "2^63" in case or "0-D" in case
    assert not must_refuse or "refused" in done.stdout, done.stdout


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">u2"])
def test_values_in_foreign_byte_order_are_refused(dtype: str) -> None:
    table, ids = np.ones((4, 8), dtype), np.zeros(2, np.int32)
    native = np.ones((4, 8), np.float32)
    calls = {
        "all_finite": lambda: _C.all_finite(table, 1),
        "Linear": lambda: _C.kernels.Linear("fp32", table, None),
        "embed": lambda: _C.kernels.embed("auto", table, native, native, ids, ids, ids),
        "set_linear": lambda: fresh_encoder().set_linear(0, "qkv", 0, table, None, 1),
        "set_tables": lambda: fresh_encoder().set_tables(table, np.ones((6, 8), dtype), native[:2]),
    }
    accepted = [name for name, call in calls.items() if attempt(lambda call=call: (call(), 1)) is not None]
    assert not accepted, f"{accepted} read {dtype} as if it were native"


@pytest.mark.parametrize("dtype", [">i8", ">i4", ">f4"])
def test_a_mask_in_foreign_byte_order_is_refused_or_right(dtype: str) -> None:
    mask = np.array([[1, 0, 1]], dtype)
    answer = attempt(_C.unpad, 1, 3, None, mask, None, None, 1, 8, 1, -1)
    assert answer is None or (answer["error"] == "" and answer["indices"].tolist() == [0, 2])
