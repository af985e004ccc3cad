"""Pickles made to do harm: nothing of them is run, and they take little time and memory to refuse."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile import Claim, Pickler, archive, bounded, refused
from small import equal

from htcompress.sources.read import read_checkpoint


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    with bounded():
        yield


CODE = ["os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__"]
CODE += ["torch.hub.load", "torch.load", "torch._utils._rebuild_tensor.__globals__", "numpy.load", "subprocess.Popen"]
CODE += ["torch.storage._load_from_bytes", "torch.serialization.load", "pickle.loads", "functools.partial"]


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("protocol", ["text", "stack", "instance"])
def test_names_of_code_are_refused(tmp_path: Path, name: str, protocol: str) -> None:
    module, _, attribute = name.rpartition(".")
    marker = tmp_path / "marker"
    text = f"import os; os.mkdir({str(marker)!r})"
    argument = b"X" + struct.pack("<I", len(text)) + text.encode()
    if protocol == "text":
        call = f"c{module}\n{attribute}\n".encode() + argument + b"\x85R"
    elif protocol == "stack":
        call = (
            b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, attribute))
            + b"\x93"
            + argument
            + b"\x85R"
        )
    else:
        call = b"(" + argument + f"i{module}\n{attribute}\n".encode()
    for k, body in enumerate((call, b"}X\x01\x00\x00\x00a" + call + b"s")):
        path = archive(tmp_path / f"{k}.pt", b"\x80\x04" + body + b".")
        message = refused(path)
        assert "pickled Python objects" in message or protocol == "instance"
        plain = tmp_path / f"{k}.bin"
        plain.write_bytes(b"\x80\x04" + body + b".")
        refused(plain)
    assert not marker.exists()


def text_of(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


PICKLES: dict[str, bytes] = {
    "a memo without end": b"\x80\x02}r\xff\xff\xff\x7f.",
    "text of exabytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
    "bytes of exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc.",
    "a frame of exabytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
    "a long of gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "a key of nested tuples": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
    "a set of nested tuples": b"\x80\x04\x8f(" + b")" + b"\x85" * 200_000 + b"\x90.",
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a stack of marks": b"\x80\x02" + b"(" * 300_000 + b".",
    "a stack that is empty": b"\x80\x02R.",
    "a call of a dict": b"\x80\x02})R.",
    "a call of a tensor's class": b"\x80\x02ctorch\nTensor\n)R.",
    "a bytearray of gigabytes": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    "a storage of gigabytes": b"\x80\x02ctorch\nFloatStorage\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    "a tensor of gigabytes": b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85\x81.",
    "a state for a function": b"\x80\x02ctorch._utils\n_rebuild_tensor\n}" + text_of("__code__") + b"K\x01sb.",
    "out of band": b"\x80\x05\x97.",
    "an extension": b"\x80\x02\x82\x01.",
    "an old protocol": b"(dp0\nS'a'\np1\nI1\ns.",
    "nothing": b"",
    "only an end": b"\x80\x02.",
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_do_harm(tmp_path: Path, case: str) -> None:
    refused(archive(tmp_path / "m.pt", PICKLES[case]))
    (tmp_path / "m.bin").write_bytes(PICKLES[case] or b"\x80")
    refused(tmp_path / "m.bin")
    # And where the object of an older file should be.
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    (tmp_path / "legacy.bin").write_bytes(head + PICKLES[case] + b"\x80\x02].")
    refused(tmp_path / "legacy.bin")


def test_attributes_that_a_pickle_gives_a_dict_do_nothing(tmp_path: Path) -> None:
    names = ("items", "keys", "values", "__iter__", "get", "copy", "__class__", "__setstate__", "metadata")
    file = io.BytesIO()
    pickler = Pickler(file, 2)
    pickler.write(b"\x80\x02")
    entries = iter([("w", Claim(4, 0, (4,), (1,)))])
    pickler.save_reduce(OrderedDict, (), dict.fromkeys(names, "no method"), dictitems=entries)
    pickler.write(b".")
    path = archive(tmp_path / "m.pt", file.getvalue(), {"0": bytes(16)})
    read = read_checkpoint(path)
    assert equal(read.tensors, {"w": torch.zeros(4)})
    assert read.metadata is None
