"""What the fuzzer starts from: small sound files of every kind, and the changes that make hostile ones of them."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Change = Callable[[random.Random], bytes]

NUMBERS = [0, 1, -1, 2, 7, 64, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**64, 10**30]
WORDS = ["", "a", "../../etc/passwd", "/", "rnn.weight_hh_l0", "state_dict", "module.", "\x00", "\n", "é" * 40]
WORDS += ["x" * 5000, "\ud800"]
VALUES: list[Any] = [
    None, True, False, 1.5, -0.5, 1e308, float("nan"), float("inf"), [], {}, [[]], [0, 1], {"a": 1}, "ht", "lstm",
    *NUMBERS, *WORDS,
]  # fmt: skip


def bytewise(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """The bytes with a few of them changed, taken out, doubled or cut off, between `low` and `high`."""
    made = bytearray(data)
    high = len(made) if high is None else high
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if len(made) < 2 or high - low < 2:
            break
        at = rng.randrange(low, min(high, len(made)))
        kind = rng.randrange(7)
        if kind == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            number = rng.choice(NUMBERS) % (1 << 64)
            made[at : at + 8] = struct.pack("<Q", number)
        elif kind == 3:
            made[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % (1 << 32))
        elif kind == 4:
            del made[at : at + rng.choice([1, 2, 8, 100])]
        elif kind == 5:
            made[at:at] = made[at : at + rng.choice([1, 2, 8, 100])]
        else:
            del made[at:]
    return bytes(made)


def restructured(value: Any, rng: random.Random, times: int | None = None) -> Any:
    """A JSON value with a few parts replaced, taken out, doubled, renamed or nested."""
    for _ in range(rng.choice([1, 1, 1, 2, 3]) if times is None else times):
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES)
        at, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 2:
            at[key] = rng.choice(VALUES)
        elif kind == 3:
            del at[key]
        elif kind == 4:
            other_at, other = rng.choice(places)
            if other in (other_at if isinstance(other_at, dict) else range(len(other_at))):
                at[key] = json.loads(json.dumps(other_at[other]))
        elif kind == 5 and isinstance(at, dict):
            at[rng.choice(WORDS) + str(rng.randrange(3))] = at.pop(key)
        elif kind == 6:
            deep = at[key]
            for _ in range(rng.choice([1, 3, 70, 400])):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            at[key] = deep
        elif isinstance(at[key], int | float) and not isinstance(at[key], bool):
            at[key] = rng.choice([at[key] + 1, at[key] - 1, -at[key], at[key] * 2, float(at[key])])
        elif isinstance(at[key], list):
            at[key] = at[key] * rng.choice([2, 3, 50])
    return value


def _places(value: Any) -> Any:
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, dict | list):
            for key in list(part) if isinstance(part, dict) else range(len(part)):
                yield part, key
                stack.append(part[key])


def operated(data: bytes, rng: random.Random) -> bytes:
    """A pickle with the arguments of a few operations replaced by others of the same length."""
    made = bytearray(data)
    operations = [(op, at) for op, _, at in pickletools.genops(data) if at is not None]
    for _ in range(rng.choice([1, 1, 2, 4])):
        op, at = rng.choice(operations)
        size = {"BININT": 4, "BININT1": 1, "BININT2": 2, "LONG_BINPUT": 4, "BINPUT": 1, "BINGET": 1}.get(op.name)
        if size is not None:
            number = rng.choice(NUMBERS) % (1 << (8 * size))
            made[at + 1 : at + 1 + size] = number.to_bytes(size, "little")
        elif op.name in ("TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "BUILD", "NEWTRUE", "NEWFALSE", "EMPTY_DICT"):
            made[at] = rng.choice(b"NR)]}b(tsuea0\x85\x86\x87\x88\x89.")
    return bytes(made)


def rezipped(archive: bytes, change: Callable[[bytes], bytes], ends: str, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive with one entry changed and the rest as it was."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as before, zipfile.ZipFile(made, "w", method) as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, change(content) if name.endswith(ends) else content)
    return made.getvalue()


def headed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: names, types, shapes, offsets that lie."""
    (length,) = struct.unpack("<Q", data[:8])
    header = restructured(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    claimed = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) % (1 << 64)
    return struct.pack("<Q", claimed) + text + data[8 + length :]


def stated(rng: random.Random) -> Any:
    """A checkpoint's object: a state_dict with odd tensors, names and company, nested this way and that."""
    import torch
    from torch import nn

    module = rng.choice([nn.LSTM, nn.GRU, nn.RNN])(rng.randrange(1, 6), rng.randrange(1, 6), rng.randrange(1, 3))
    state: dict[Any, Any] = dict(nn.ModuleDict({"rnn": module, "head": nn.Linear(2, 2)}).state_dict())
    odd: list[Callable[[Any], Any]] = [
        lambda t: t.expand(3, *t.shape),
        lambda t: t.reshape(-1)[:1].expand(*t.shape),
        lambda t: t.reshape(-1)[:1].expand(rng.choice([10**3, 10**6, 10**9, 10**12]), 4),
        lambda t: torch.empty(0).as_strided((rng.choice([0, 10**9]), 0), (1, 1)),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: t.to(rng.choice([torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int8, torch.bool])),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: t * float("nan"),
        lambda t: t * float("inf"),
        lambda t: t.T if t.ndim == 2 else t,
        lambda t: t.flatten(),
        lambda t: t.reshape(-1)[1:],
        nn.Parameter,
        lambda t: t.to(torch.complex64),
        lambda t: rng.choice(VALUES),
        lambda t: {"inner": t},
    ]
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        name = rng.choice(list(state))
        kind = rng.randrange(5)
        # Not of what is already expanded: another change would write it out here.
        if kind <= 2 and isinstance(state[name], torch.Tensor) and state[name].numel() < 10_000:
            state[name] = rng.choice(odd)(state[name])
        elif kind == 3:
            ends = ["_orig", "_mask", "_g", "_v", "_raw", "_extra_state", "_reverse", "9999999"]
            renamed = rng.choice([rng.choice(WORDS), rng.randrange(9), f"{name}{rng.choice(ends)}"])
            state[renamed] = state.pop(name)
        else:
            state[f"{rng.choice(WORDS)}_extra_state"] = rng.choice([*VALUES, state[name], {"t": state[name]}])
    if rng.random() < 0.1:
        state["itself"] = state
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        key = rng.choice(["state_dict", "model", "net", "ema", "encoder", "optimizer", "state_dict_ema", 3, ""])
        other = rng.choice([None, 3, [1], {"param_groups": [], "state": state}, state])
        state = {key: state, rng.choice(["epoch", "ema", "decoder", "optimizer", "rng_state"]): other}
    if rng.random() < 0.05:
        for _ in range(rng.choice([5, 20, 2000])):
            state = {"a": state, "b": state} if rng.random() < 0.5 else {"a": state}
    return state


TOML = """\
[tool.htcompress.check]
max_parameters = 5000
max_drop = 0.01

[tool.htcompress.check.tagger]
report = "model-ht"
baseline = "old.json"
max_bytes = "20k"
max_parameters_change = "5%"
min_ratio = 10
"""
TOML_PARTS = [
    "= 1e999", "= nan", "= -inf", f"= {'9' * 5000}", f"= {2**70}", "= true", "= []", "= {a = 1}", '= ""', '= "5%"',
    "= 1979-05-27", '= "\\u0000"', "[" * 2000, "a." * 500 + "b = 1", "[[tool.htcompress.check]]", "[tool]", '"""', "\r",
    "= 0x" + "f" * 400, "max_parameters = 1", "report = 3", "[tool.htcompress.check.check]", "= '1k'", "= 1_0_0",
    "#" * 3000,
]  # fmt: skip


def configured(rng: random.Random) -> bytes:
    """A gate's configuration with lines changed, moved and replaced."""
    lines = TOML.splitlines()
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(lines))
        kind = rng.randrange(4)
        if kind == 0:
            lines[at] = lines[at].partition("=")[0] + rng.choice(TOML_PARTS)
        elif kind == 1:
            lines.insert(at, rng.choice(TOML_PARTS))
        elif kind == 2:
            lines[at] = lines[rng.randrange(len(lines))]
        else:
            text = bytewise("\n".join(lines).encode("utf-8", "surrogateescape"), rng)
            lines = text.decode("utf-8", "surrogateescape").split("\n") or [""]
    return "\n".join(lines).encode("utf-8", "surrogateescape")
