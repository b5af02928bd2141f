"""Read a pickle without running anything that it asks for.

A pickle is a program for a stack machine that may import and call whatever it names. This machine imports and calls
nothing: a name from the file becomes a placeholder, and so does all that is made from one. What the pickle says of
plain values, lists, dictionaries and tensors is kept, so tensors that lie beside foreign objects can be read.

`torch.load` with `weights_only=True` is no way in: it refuses files with foreign objects, reserves memory of the
size that a file claims, and a tuple nested a million times as a key ends the process (torch 2.13).
"""

import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO, RawIOBase
from typing import IO, Any, cast

MAX_STEPS = 10_000_000  # a tensor takes about 40; each step may make an object of some 100 bytes
_MAX_ARGUMENTS = 8  # of the functions that build tensors

# operations that push what follows them in the file
# fmt: off
_VALUES = frozenset((
    "NONE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
))
# fmt: on
_PLAIN_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """Stands for a foreign name, for what would have been made from it, or for a key that is not text.

    Each one equals itself only.
    """

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PickledStorage:
    """What a pickle says of a storage; nothing of it has been checked."""

    kind: Any
    key: Any
    num_elements: Any
    view: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """What a pickle says of a tensor; nothing of it has been checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any = None
    metadata: Any = None


def read_inert(stream: BytesIO | RawIOBase) -> tuple[Any, dict[str, PickledStorage]]:
    """Read one pickle.

    Args:
        stream: stands at the start of the pickle, and behind its end afterwards.

    Returns:
        What the pickle holds, made of plain values, tuples, lists, dictionaries (their keys are text or
        placeholders), placeholders and tensors; and the storages that it names by their keys. It may contain itself.

    Raises:
        ValueError: the pickle is cut short, broken or too long.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            machine.count_steps(1)
            machine.run(opcode.name, argument)
        return machine.stack[-1], machine.storages
    except (IndexError, KeyError) as error:  # takes more from the stack than there is, or what was never kept
        raise ValueError(f"the pickle is broken ({type(error).__name__}: {error})") from error


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, PickledStorage] = {}
        self.num_steps = 0

    def count_steps(self, count: int) -> None:
        self.num_steps += count
        if self.num_steps > MAX_STEPS:
            raise ValueError(f"the pickle takes more than {MAX_STEPS} steps")

    def run(self, operation: str, argument: Any) -> None:
        """Do one step; the commonest come first."""
        push = self.stack.append
        match operation:
            case _ if operation in _VALUES:
                push(argument)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "MARK":
                self.marked.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self.pop_many(int(operation[-1]))))
            case "EMPTY_TUPLE":
                push(())
            case "NEWTRUE" | "NEWFALSE":
                push(operation == "NEWTRUE")
            case "BINPERSID":
                push(self.load_persistent(self.stack.pop()))
            case "REDUCE":
                function, arguments = self.pop_many(2)
                push(self.call(_name(function), arguments))
            case "GLOBAL":
                push(Placeholder(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                module, name = self.pop_many(2)
                # the same long text may come back in each step
                push(Placeholder(f"{_name(module):.200}.{_name(name):.200}"))
            case "EMPTY_DICT":
                push({})
            case "SETITEM":
                items = self.pop_many(2)
                self.set_items(items)
            case "SETITEMS":
                items = self.pop_mark()
                self.set_items(items)
            case "DICT":
                items = self.pop_mark()
                self.stack.append({})
                self.set_items(items)
            case "EMPTY_LIST":
                push([])
            case "APPEND":
                items = self.pop_many(1)
                self.extend(items)
            case "APPENDS":
                items = self.pop_mark()
                self.extend(items)
            case "LIST":
                items = self.pop_mark()
                self.stack.append(items)
            case "BUILD":  # sets the state of what lies below
                self.pop_many(1)
            case "NEWOBJ" | "NEWOBJ_EX":
                made, *_ = self.pop_many(2 if operation == "NEWOBJ" else 3)
                push(Placeholder(_name(made)))
            case "OBJ":
                made, *_ = self.pop_mark() or [None]
                self.stack.append(Placeholder(_name(made)))
            case "INST":
                self.pop_mark()
                self.stack.append(Placeholder(argument.replace(" ", ".", 1)))
            case "EMPTY_SET":
                push(Placeholder("set"))
            case "ADDITEMS":
                self.pop_mark()
            case "FROZENSET":
                self.pop_mark()
                self.stack.append(Placeholder("frozenset"))
            case "EXT1" | "EXT2" | "EXT4":
                push(Placeholder(operation))
            case "DUP":
                push(self.stack[-1])
            case "POP" if self.stack:
                self.stack.pop()
            case "POP" | "POP_MARK":
                self.pop_mark()
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:  # GET, PUT and PERSID are of protocol 0, in which there can be no tensors
                raise ValueError(f"the pickle asks for {operation}, which no checkpoint needs")

    def pop_many(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError(f"{count} wanted from a stack of {len(self.stack)}")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_dictionary(zip(items[::2], items[1::2], strict=True)))

    def load_persistent(self, what: Any) -> PickledStorage | Placeholder:
        match what:
            case ("storage", kind, str(key), _, num_elements):
                storage = PickledStorage(kind, key, num_elements)
            case ("storage", kind, str(key), _, num_elements, view):
                storage = PickledStorage(kind, key, num_elements, view)
            case _:  # the source text of a class, in the old form
                return Placeholder("persistent id")
        self.storages.setdefault(key, storage)
        return storage

    def call(self, name: str, arguments: Any) -> Any:
        """Make what a call in the pickle stands for: tensors and ordered dictionaries, a placeholder for all else."""
        if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
            return Placeholder(name)
        match name, arguments:
            case "torch._tensor._rebuild_from_type_v2", (function, Placeholder(name=kind), tuple(inner), _):
                # a tensor with attributes of its own, which are left out; another class may mean its values otherwise
                if kind not in _PLAIN_TENSORS or len(inner) > _MAX_ARGUMENTS:
                    return Placeholder(kind)
                name, arguments = _name(function), inner
        match name, arguments:
            case "torch._utils._rebuild_tensor", (storage, offset, shape, strides):
                return PickledTensor(storage, offset, shape, strides)
            case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, _, _, *rest) if len(rest) <= 1:
                return PickledTensor(storage, offset, shape, strides, None, *rest)
            case "torch._utils._rebuild_tensor_v3", (storage, offset, shape, strides, _, _, dtype, *rest):
                return PickledTensor(storage, offset, shape, strides, dtype, *rest)
            case (("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"), (data, _, _, *_)):
                return data
            case "torch.Size", (tuple(sizes),):
                return sizes
            case "collections.OrderedDict", ():
                return {}
            case "collections.OrderedDict", (list(pairs),):
                self.count_steps(len(pairs))  # the same list may come back in each step
                if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
                    return _dictionary((key, value) for key, value in pairs)
        return Placeholder(name)


def _name(value: Any) -> str:
    match value:
        case Placeholder():
            return value.name
        case str():
            return value
    return type(value).__name__


def _dictionary(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Build a dictionary without hashing what could be nested without end or chosen to collide."""
    return {key if isinstance(key, str) else Placeholder(_key_name(key)): value for key, value in pairs}


def _key_name(key: Any) -> str:
    return str(key) if type(key) is int and abs(key) < 2**63 else _name(key)
