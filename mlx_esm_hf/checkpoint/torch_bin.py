"""Reading files of torch.save, state dicts or training checkpoints, without torch and without executing anything.

The formats are those of torch.serialization (torch/serialization.py). Since torch 1.6 the file is a zip of
uncompressed records: `data.pkl` is the pickled dict, and `data/<key>` holds the bytes of a storage. Earlier files are a
series of pickles (magic number, protocol, machine, dict, list of storage keys), followed by the storages, each as its
number of elements (int64) and its bytes. In both formats, a tensor is pickled as a call of `_rebuild_tensor_v2` with a
persistent id that names its storage.

pickle.Unpickler is not used. Whatever its find_class refuses, a file can still make it call and modify the globals that
are allowed, or crash Python (by hashing deeply nested tuples). Instead, pickletools splits the pickle into opcodes, and
an interpreter that only knows the opcodes of a state dict turns them into inert data. In training checkpoints it also
reads settings: an `argparse.Namespace` in those of fairseq, and omegaconf objects in that of ESMFold. Each of these
objects becomes a dict of its attributes.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_esm_hf.checkpoint.mapped import mapped
from mlx_esm_hf.errors import CheckpointError

_DTYPES = {
    "torch.BFloat16Storage": "u2",  # NumPy has no bfloat16: the bits are read as uint16
    "torch.HalfStorage": "f2",
    "torch.FloatStorage": "f4",
    "torch.DoubleStorage": "f8",
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
_MAPPED = {
    "torch.BFloat16Storage": mx.bfloat16,
    "torch.HalfStorage": mx.float16,
    "torch.FloatStorage": mx.float32,
}
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_ALLOWED_GLOBALS = frozenset({_DICT, _TENSOR, *_PARAMETERS, *_DTYPES})
# Objects of settings, and other types in omegaconf's metadata. Python 2 calls builtins `__builtin__`.
_OBJECTS = frozenset(
    {"argparse.Namespace", "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"}
    | {"omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"}
    | {f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean")}
)
_DEFAULTDICT = "collections.defaultdict"
_SETTINGS = (
    _OBJECTS
    | {f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("dict", "list", "int", "long", "str")}
    | {_DEFAULTDICT, "typing.Any"}
)

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_CHUNK = 1 << 20  # bytes read at a time to check them
_MAX_DIMENSIONS = 32  # NumPy 1 allows no more
_MAX_EXPANSION = 1 << 30  # bytes by which all tensors together may exceed the file; a stride of 0 repeats elements

_ADVICE = "Nothing in the file was executed. Download it again, or use the safetensors version of the model."

StateOf = Callable[[Any], Any]  # finds the state dict in the unpickled data
Loaded = tuple[Any, dict[str, mx.array]]  # the unpickled data, the arrays of the state dict


@dataclass(frozen=True, slots=True)
class _Global:
    """The name of a global that the pickle refers to, never the global itself."""

    name: str


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that the pickle requests, or a persistent id: kept as data, never executed."""

    function: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class _Tensor:
    """The location of a tensor in its storage, in elements."""

    storage: str
    storage_type: str
    storage_numel: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return np.dtype(_DTYPES[self.storage_type]).itemsize


class _Object(dict[str, Any]):
    """The attributes of an object."""


def load_torch_bin(path: str | os.PathLike[str]) -> dict[str, mx.array]:
    """Return the tensors of a state dict, in the order of the file.

    Arrays are evaluated, or memory-mapped if the file is a zip (see `mapped`). Dtypes are kept, except that float64
    becomes float32. Tied tensors are the same array.

    Raises:
        CheckpointError: the file is damaged, or contains anything but a state dict of plain tensors.
        OSError: the file cannot be opened.
    """
    return _load_path(path, _ALLOWED_GLOBALS, lambda data: data)[1]


def load_torch_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return the state dict under "model" of a training checkpoint, see `load_torch_bin`, and its other entries.

    The other entries are dicts, lists, tuples, strings and numbers. An `argparse.Namespace` becomes a dict of its
    attributes, and so do omegaconf objects, whose values `omegaconf_values` extracts. Tensors outside "model", such as
    those of an optimizer, are not read; the unpickled description stays in their place.

    Raises:
        CheckpointError: the file is damaged, has no "model", or contains anything else.
        OSError: the file cannot be opened.
    """
    data, arrays = _load_path(path, _ALLOWED_GLOBALS | _SETTINGS, _model_of)
    return arrays, {key: value for key, value in data.items() if key != "model"}


def omegaconf_values(node: Any) -> Any:
    """Return the dicts, lists and plain values of an omegaconf config from `load_torch_checkpoint`.

    Raises:
        RecursionError: the config contains itself, or is nested too deeply.
    """
    match node:
        case {"_val": value}:
            return value
        case {"_content": content}:
            return omegaconf_values(content)
        case dict():
            return {key: omegaconf_values(value) for key, value in node.items()}
        case list():
            return [omegaconf_values(value) for value in node]
    return node


def _model_of(data: Any) -> Any:
    if not isinstance(data, dict) or "model" not in data:
        raise CheckpointError(f"it holds a pickled {_kind(data)}, not a training checkpoint with a 'model'")
    return data["model"]


def _load_path(path: str | os.PathLike[str], allowed: frozenset[str], state_of: StateOf) -> Loaded:
    """Return the unpickled data and the arrays of its state dict.

    Args:
        path: the file.
        allowed: the globals that the pickle may refer to.
        state_of: returns the state dict in the unpickled data.
    """
    with open(path, "rb") as file:
        try:
            return _load(file, os.fstat(file.fileno()).st_size, allowed, state_of)
        except MemoryError as error:
            raise MemoryError(f"{os.fspath(path)} needs more memory to be read than is available.") from error
        except Exception as error:  # zipfile, pickletools, NumPy and MLX fail in many ways on damaged bytes
            known = isinstance(error, CheckpointError)
            reason = error if known else f"the file is damaged ({type(error).__name__}: {error})"
            raise CheckpointError(f"{os.fspath(path)}: {reason}. {_ADVICE}") from error


def _load(file: BinaryIO, file_size: int, allowed: frozenset[str], state_of: StateOf) -> Loaded:
    head = file.read(512)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        return _load_zip(file, file_size, allowed, state_of)
    if head.startswith(b"\x80"):  # the opcode PROTO
        return _load_legacy(file, file_size, allowed, state_of)
    if not head:
        raise CheckpointError("the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError("this is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    if head[257:262] == b"ustar":
        raise CheckpointError("the tar format of the first torch releases is not supported")
    raise CheckpointError(f"torch.save did not write this file: it starts with {head[:16]!r}")


def _load_zip(file: BinaryIO, file_size: int, allowed: frozenset[str], state_of: StateOf) -> Loaded:
    with zipfile.ZipFile(file) as archive:
        # All records are in one top folder, called "archive" or like the file that torch.save wrote.
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}

        def read(name: str) -> bytes:
            if name not in records:
                raise CheckpointError(f"the record {name!r} is missing in the zip archive")
            if records[name].compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"the record {name!r} is compressed, which torch.save never does")
            return archive.read(records[name])  # checks the CRC

        data, _ = _unpickle(io.BytesIO(read("data.pkl")), allowed)
        tensors = _tensors(state_of(data))
        sizes = {name[5:]: info.file_size for name, info in records.items() if name.startswith("data/")}
        _check(tensors, sizes, file_size)
        byteorder = read("byteorder") if "byteorder" in records else b"little"
        if byteorder not in (b"little", b"big"):
            raise CheckpointError(f"the byte order {byteorder[:16]!r} is unknown")
        order = "<" if byteorder == b"little" else ">"

        def in_file(tensor: _Tensor) -> mx.array | None:
            record = records[f"data/{tensor.storage}"]
            if order == ">" or record.compress_type != zipfile.ZIP_STORED:
                return None
            file.seek(record.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            array = _map(file, record.header_offset + 30 + name + extra, tensor)
            if array is not None:
                with archive.open(record) as stream:
                    while stream.read(_CHUNK):  # zipfile checks the CRC at the end
                        pass
            return array

        return data, _arrays(tensors, lambda key: read(f"data/{key}"), order, in_file)


def _load_legacy(file: BinaryIO, file_size: int, allowed: frozenset[str], state_of: StateOf) -> Loaded:
    if _unpickle(file)[0] != _LEGACY_MAGIC or _unpickle(file)[0] != _LEGACY_PROTOCOL:
        raise CheckpointError("this is a pickle, but not one that torch.save wrote")
    _unpickle(file)  # describes the machine that wrote the file; storages are little-endian on every machine
    data, identities = _unpickle(file, allowed)
    tensors = _tensors(state_of(data))
    # This includes tensors that are not read, such as those of an optimizer, whose storages lie between the others.
    itemsizes = dict(map(_storage_itemsize, identities))
    starts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for key in _unpickle(file)[0]:
        if not isinstance(key, str) or key not in itemsizes:
            raise CheckpointError("the file lists a storage that no tensor uses")
        (numel,) = struct.unpack("<q", file.read(8))
        starts[key], sizes[key] = file.tell(), numel * itemsizes[key]
        if not 0 <= sizes[key] <= file_size - starts[key]:
            raise CheckpointError(f"the storage {key!r} of {numel} elements does not fit in the file")
        file.seek(sizes[key], os.SEEK_CUR)
    _check(tensors, sizes, file_size)

    def read(key: str) -> bytes:
        file.seek(starts[key])
        return file.read(sizes[key])

    return data, _arrays(tensors, read, "<", lambda _: None)  # storages are rarely aligned in this format


def _storage_itemsize(identity: Any) -> tuple[str, int]:
    """Return the key of the storage that a persistent id names, and the bytes of an element."""
    match identity:
        case ("storage", _Global(kind), str(key), *_) if kind in _DTYPES:
            return key, np.dtype(_DTYPES[kind]).itemsize
    raise CheckpointError(f"it contains a persistent id of a {_kind(identity)} that is not a storage")


def _unpickle(file: BinaryIO, allowed: frozenset[str] = _ALLOWED_GLOBALS) -> tuple[Any, list[Any]]:
    """Read one pickle as data: strings, numbers, lists, tuples, dicts, `_Object`, `_Global` and `_Call`.

    Returns:
        The unpickled data, and all persistent ids in it.
    """
    try:
        return _interpret(file, allowed)
    except MemoryError as error:  # a pickle of a state dict is small
        raise CheckpointError("the file is damaged (a length in its pickle is too large)") from error


def _interpret(file: BinaryIO, allowed: frozenset[str]) -> tuple[Any, list[Any]]:
    """Do the work of `_unpickle`."""
    stack: list[Any] = []
    identities: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def cut(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    # An IndexError, TypeError or similar here means a malformed pickle, which the caller reports.
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(cut(-int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(cut(marks.pop())))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                items = cut(-1 if opcode.name == "APPEND" else marks.pop())
                list.extend(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                items = cut(-2 if opcode.name == "SETITEM" else marks.pop())
                if not all(isinstance(key, str | int) for key in items[::2]):  # a deep key would crash hash()
                    raise CheckpointError("a key of a dict is neither a string nor an integer")
                dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if opcode.name == "MEMOIZE" else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                name = ".".join(cut(-2)) if argument is None else str(argument).replace(" ", ".")
                if name not in allowed:
                    raise CheckpointError(f"it holds the global {name!r}, which no state dict needs")
                stack.append(_Global(name))
            case "BINPERSID":
                identities.append(stack[-1])
                stack.append(_Call("persistent id", stack.pop()))
            case "REDUCE":
                function, arguments = cut(-2)
                if not isinstance(function, _Global):
                    raise CheckpointError("the pickle calls what is not a global")
                is_dict = (function.name == _DICT and arguments == ()) or function.name == _DEFAULTDICT
                stack.append({} if is_dict else _Call(function.name, arguments))
            case "NEWOBJ" if allowed >= _OBJECTS:
                match cut(-2):
                    case [_Global(name), ()] if name in _OBJECTS:
                        stack.append(_Object())
                    case _:
                        raise CheckpointError("the pickle makes an object of a class that is not one of settings")
            case "BUILD":  # sets attributes: an OrderedDict has _metadata with module versions
                attributes = stack.pop()
                if not isinstance(stack[-1], dict):
                    raise CheckpointError("the pickle sets attributes of what is not a dict")
                if isinstance(stack[-1], _Object):
                    if not isinstance(attributes, dict):
                        raise CheckpointError(f"the attributes of an object are a pickled {_kind(attributes)}")
                    stack[-1].update(attributes)
            case _:
                raise CheckpointError(f"it holds the opcode {opcode.name}, which no state dict needs")
    return stack.pop(), identities


def _tensors(state: Any) -> dict[str, _Tensor]:
    if not isinstance(state, dict):
        raise CheckpointError(f"it holds a pickled {_kind(state)}, not a state dict")
    return {key: _tensor(key, value) for key, value in state.items()}


def _tensor(key: Any, value: Any) -> _Tensor:
    if not isinstance(key, str):
        raise CheckpointError(f"the key {key!r} of the state dict is not a string")
    match value:
        case _Call(function, (data, *_)) if function in _PARAMETERS:
            value = data
    match value:
        # The last two, requires_grad and hooks, do not matter. A seventh would mean a conjugated or negated tensor.
        case _Call(function, (_Call("persistent id", storage), offset, tuple(size), tuple(stride), _, _)):
            match storage:
                # The fourth is the device. The legacy format has a sixth, a view of a storage; it is None in practice.
                case ("storage", _Global(kind), str(name), _, numel, *view) if view in ([], [None]):
                    integers = all(type(number) is int for number in (numel, offset, *size, *stride))
                    if function == _TENSOR and kind in _DTYPES and integers:
                        return _Tensor(name, kind, numel, offset, size, stride)
    raise CheckpointError(f"{key!r} is a pickled {_kind(value)}, not a plain tensor as in model.state_dict()")


def _kind(value: Any) -> str:
    return value.function if isinstance(value, _Call) else type(value).__name__


def _check(tensors: Mapping[str, _Tensor], sizes: Mapping[str, int], file_size: int) -> None:
    """Check the tensors against the `sizes` of the storages, in bytes, before any of these is read."""
    total = 0
    for tensor, key in {tensor: key for key, tensor in tensors.items()}.items():  # tied tensors are counted once
        if tensor.storage not in sizes:
            raise CheckpointError(f"the data of {key!r} is missing")
        held = sizes[tensor.storage] // tensor.itemsize
        if tensor.storage_numel != held:
            raise CheckpointError(f"{key!r} expects a storage of {tensor.storage_numel} elements, the file has {held}")
        size, stride = tensor.size, tensor.stride
        if not len(size) == len(stride) <= _MAX_DIMENSIONS or min(tensor.offset, *size, *stride, 0) < 0:
            raise CheckpointError(f"the offset, size and stride of {key!r} are not valid")
        last = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= held:
            raise CheckpointError(f"{key!r} reaches beyond the {held} elements of its storage")
        total += math.prod(size) * tensor.itemsize
        if total > file_size + _MAX_EXPANSION:  # with strides of 0, a few bytes can claim to be terabytes
            raise CheckpointError(f"{key!r} makes the tensors much larger than the file")


def _map(file: BinaryIO, start: int, tensor: _Tensor) -> mx.array | None:
    """Return a tensor mapped from the file, whose storage begins at byte `start`; None if it has to be read."""
    row_major = tuple(math.prod(tensor.size[i + 1 :]) for i in range(len(tensor.size)))
    if tensor.storage_type not in _MAPPED or tensor.stride != row_major:
        return None
    return mapped(file.name, start + tensor.offset * tensor.itemsize, tensor.size, _MAPPED[tensor.storage_type])


def _arrays(
    tensors: Mapping[str, _Tensor],
    read: Callable[[str], bytes],
    byteorder: str,
    in_file: Callable[[_Tensor], mx.array | None],
) -> dict[str, mx.array]:
    """Return the arrays of the tensors.

    Each storage is read at most once, and one at a time. It is not read if all of its tensors can be mapped.

    Args:
        tensors: the tensors.
        read: returns the bytes of a storage.
        byteorder: "<" or ">".
        in_file: maps a tensor, or returns None if it has to be read.
    """
    views: defaultdict[str, set[_Tensor]] = defaultdict(set)
    for tensor in tensors.values():
        views[tensor.storage].add(tensor)
    arrays: dict[_Tensor, mx.array] = {}
    for storage in views:
        found = {tensor: array for tensor in views[storage] if (array := in_file(tensor)) is not None}
        if found.keys() != views[storage]:
            buffer = read(storage)
            found = {tensor: _array(tensor, buffer, byteorder) for tensor in views[storage]}
            del buffer  # before the next one is read
        arrays |= found
    return {key: arrays[tensor] for key, tensor in tensors.items()}


def _array(tensor: _Tensor, buffer: bytes, byteorder: str) -> mx.array:
    dtype = np.dtype(byteorder + _DTYPES[tensor.storage_type])
    elements = np.frombuffer(buffer, dtype, tensor.storage_numel)[tensor.offset :]
    strides = [step * tensor.itemsize for step in tensor.stride]
    values = np.lib.stride_tricks.as_strided(elements, tensor.size, strides)
    array = mx.array(values.astype(dtype.newbyteorder("="), copy=False))  # this copies, and float64 becomes float32
    if tensor.storage_type == "torch.BFloat16Storage":
        array = array.view(mx.bfloat16)
    mx.eval(array)
    return array
