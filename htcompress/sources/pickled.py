"""Pickles read without running anything: names in them stand for entries of a table here, never for imports.

What a pickle calls a tensor becomes a `Pending`: what it claims, not yet looked at. Nothing is allocated that is larger
than the pickle itself.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from htcompress.sources.objects import Inert, Opaque, Pending, PlainDict, Storage, StorageType, unfolded

MOST_PICKLED = 1 << 25
"""The bytes that a pickle may have, its tensors' numbers apart; reading takes up to a hundred times as many."""


class ForeignObjectError(Exception):
    """A pickle wants an object that is no plain data; its text is the object's dotted name."""


@dataclass(frozen=True)
class _Global:
    """What a name in a pickle stands for: `make` is what calling it gives, None where it only names a type."""

    name: str
    make: Callable[..., Any] | None = None
    known: bool = True


def load(stream: io.BytesIO, dtypes: dict[str, torch.dtype] | None = None) -> Any:
    """The object of the pickle that begins at the stream's position, of any protocol from 2 to 5.

    Args:
        stream: of the pickle's bytes; it is left behind the pickle.
        dtypes: where given, takes the dtype of each storage that the pickle names, by its key.

    Raises:
        ForeignObjectError: it calls a function that is not known. Objects of classes that are not become `Inert`.
        Exception: it is damaged; which one says nothing.
    """
    return unfolded(_Unpickler(stream, {} if dtypes is None else dtypes).load())


def _dense(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None) -> Pending:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    metadata = rest[2] if len(rest) > 2 else None
    lazily = "a view that torch has not evaluated (conjugated or negated)" if metadata else ""
    return Pending(storage, offset, size, stride, storage.dtype if dtype is None else dtype, lazily)


def _dense_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor of no dtype")
    return _dense(storage, offset, size, stride, grad, hooks, *rest, dtype=dtype)


def _quantised(storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, *rest: Any) -> Pending:
    if not isinstance(storage, Storage) or not isinstance(quantizer, tuple):
        raise pickle.UnpicklingError("a quantised tensor without a storage")
    return Pending(storage, offset, size, stride, storage.dtype, "a quantised tensor", quantizer)


def _odd(kind: str) -> Callable[..., Pending]:
    return lambda *_: Pending(None, 0, (), (), None, kind)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(make: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    if not isinstance(make, _Global) or make.make is None or not isinstance(kind, _Global):
        raise pickle.UnpicklingError("a tensor of an unknown class")
    return make.make(*arguments)


def _reconstructed(kind: Any, base: Any = None, state: Any = None) -> Any:
    """An object of an old protocol."""
    if not isinstance(kind, _Global) or kind.known:
        raise pickle.UnpicklingError("an object of no class")
    return Inert(kind.name)


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _sized(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _bytes(text: Any = b"", *_: Any) -> bytes:
    # Protocol 2 writes bytes as text.
    if isinstance(text, str):
        return text.encode("latin-1")
    if not isinstance(text, bytes):
        raise pickle.UnpicklingError("bytes of what is neither bytes nor text")
    return text


def _set(items: Any = ()) -> set[Any]:
    return {_key(item) for item in items}


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "UntypedStorage": torch.uint8,
    **{
        f"{name}Storage": dtype
        for name, dtype in (
            ("Double", torch.float64),
            ("Float", torch.float32),
            ("Half", torch.float16),
            ("BFloat16", torch.bfloat16),
            ("Long", torch.int64),
            ("Int", torch.int32),
            ("Short", torch.int16),
            ("Char", torch.int8),
            ("Byte", torch.uint8),
            ("Bool", torch.bool),
            ("ComplexDouble", torch.complex128),
            ("ComplexFloat", torch.complex64),
            ("QInt8", torch.qint8),
            ("QUInt8", torch.quint8),
            ("QInt32", torch.qint32),
        )
    },
}
_TYPES = (
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "str", "bool", "object")),
)
_MADE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda *given: PlainDict(*map(_pairs, given)),
    "collections.Counter": lambda *_: PlainDict(),
    "collections.defaultdict": lambda *_: PlainDict(),
    "torch.Size": _sized,
    "torch._utils._rebuild_tensor": _dense,
    "torch._utils._rebuild_tensor_v2": _dense,
    "torch._utils._rebuild_tensor_v3": _dense_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_sparse_tensor": _odd("a sparse tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _odd("a tensor without numbers (of the meta device)"),
    "copyreg._reconstructor": _reconstructed,
    **{f"torch.jit._pickle.build_{kind}list": _first for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": _first,
    "_codecs.encode": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.set": _set,
    "builtins.frozenset": _set,
}
_OPAQUE = re.compile(
    r"torch\.(device|serialization\._get_layout|torch_version\.TorchVersion)|argparse\.Namespace|types\.SimpleNamespace"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)|builtins\.(complex|slice|range)"
    r"|pathlib\.\w+|datetime\.(datetime|date|timedelta)"
)


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    return [(_key(key), value) for key, value in (items.items() if isinstance(items, dict) else items)]


def _key(value: Any) -> Any:
    """A key of a dict or a member of a set; nesting is refused, since hashing follows it without an end."""
    parts = value if type(value) is tuple else (value,)
    if not all(isinstance(part, str | bytes | int | float | torch.dtype | None) for part in parts):
        raise pickle.UnpicklingError("a key that is no plain value")
    return value


def _dispatched() -> dict[int, Callable[[Any], None]]:
    """What the opcodes of plain data do; the others are none for this reader."""
    names = (
        "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
        "SHORT_BINSTRING BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 "
        "EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL BINPERSID "
        "BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE"
    )
    codes = [getattr(pickle, name)[0] for name in names.split()]
    return {code: pickle._Unpickler.dispatch[code] for code in codes}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler with a table in place of imports, and nothing called but that table's functions."""

    stack: list[Any]
    dispatch = _dispatched()

    def __init__(self, stream: io.BytesIO, dtypes: dict[str, torch.dtype]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._dtypes = dtypes

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}.get(module, module)
        full = f"{module}.{name}"
        if full in _MADE:
            return _Global(full, _MADE[full])
        if full in _TYPES:
            return _Global(full)
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return StorageType(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name.startswith("per_") and isinstance(vars(torch).get(name), torch.qscheme):
            return vars(torch)[name]
        if _OPAQUE.fullmatch(full):
            return _Global(full, lambda *_: Opaque())
        return _Global(full, known=False)

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] in ("module", b"module") and len(pid) == 4 and isinstance(pid[1], _Global):
            return pid[1]  # a class with its source, as torch has written it before 1.6
        kind, dtype, key, _, claimed, *view = pid
        if kind not in ("storage", b"storage") or not isinstance(dtype, StorageType) or type(claimed) is not int:
            raise pickle.UnpicklingError("a reference to what is no storage")
        part = None
        if view and view[0] is not None:
            _, first, count = view[0]
            if type(first) is not int or type(count) is not int:
                raise pickle.UnpicklingError("a part of a storage without bounds")
            part = first, count
        self._dtypes[str(key)] = dtype.dtype
        return Storage(str(key), dtype.dtype, claimed, part)

    def _call(self) -> None:
        arguments = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, _Global) and not made.known:
            raise ForeignObjectError(made.name)
        if not isinstance(made, _Global) or made.make is None or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call of what cannot be called")
        self.stack[-1] = made.make(*arguments)

    def _new(self) -> None:
        if not isinstance(self.stack[-2], _Global) or self.stack[-2].known:
            self._call()
            return
        self.stack.pop()
        self.stack[-1] = Inert(self.stack[-1].name)

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, PlainDict):
            made.__setstate__(state)
        elif isinstance(made, Inert):
            made.build(state)
        elif not isinstance(made, Opaque | Pending):
            _refuse("state of what has none")

    def _put(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, dict):
            for key, value in pairs:
                target[_key(key)] = value
        elif not isinstance(target, Opaque):
            _refuse("entries of what is no dict")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(_key(item) for item in items)
        elif not isinstance(target, Opaque):
            _refuse("members of what is no list")

    def _frozenset(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.stack.append(_set(items))

    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.NEWOBJ[0]] = _new
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _setitem
    dispatch[pickle.SETITEMS[0]] = lambda self: self._put(self.pop_mark())
    dispatch[pickle.APPEND[0]] = lambda self: self._append([self.stack.pop()])
    dispatch[pickle.APPENDS[0]] = lambda self: self._append(self.pop_mark())
    dispatch[pickle.ADDITEMS[0]] = lambda self: self._append(self.pop_mark())
    dispatch[pickle.FROZENSET[0]] = _frozenset


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(what)
