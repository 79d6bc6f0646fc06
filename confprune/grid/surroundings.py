"""Whether a network's calls leave alone what all its copies have in common.

Copies on threads of their own may meet in variables of modules, in attributes of classes, in
closures, and in generators of random numbers. What is there is looked at while the network runs.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MAPPINGS = (dict, OrderedDict, defaultdict)
_CONTAINERS = (list, set, deque)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "scipy", "confprune"}
_STEP = 1.2  # between the calls after which there is a look: what comes and goes stays for many
_MOST = 1000  # elements of a container that are looked at


class Surroundings(TorchFunctionMode):
    """Watches what the code of a network's modules can reach besides the network.

    These are the variables of the files in which their classes, and the functions and modules used
    there, are written, their closures, and what is inside all these, one container deep.

    Attributes
    ----------
    touched : bool
        Whether something was changed in a run as ``with surroundings: network(batch)``.

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.surroundings import Surroundings
    >>> network = torch.nn.Linear(2, 2)
    >>> with Surroundings(network) as surroundings:
    ...     _ = network(torch.ones(1, 2))
    >>> surroundings.touched
    False
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.touched = False
        self._calls = self._next = 0.0
        self._inside = list(_insides(network))
        self._kept = self._contents()  # alive, so that nothing new has the identity of these
        self._before = _identities(self._kept)
        self._generators: _Generators | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, and look around."""
        result = func(*args, **(kwargs or {}))
        self._calls += 1
        if self._calls >= self._next:
            self._next = self._calls * _STEP
            self._look()
        return result

    def __enter__(self) -> Surroundings:
        self._generators = _Generators()
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._look()
        assert self._generators is not None
        self.touched |= self._generators.restore()

    def _look(self) -> None:
        if self._inside and not self.touched:
            self.touched = _identities(self._contents()) != self._before

    def _contents(self) -> list[list[Any]]:
        return [list(inside()) for inside in self._inside]


def _identities(contents: list[list[Any]]) -> list[list[Any]]:
    """Numbers, as of versions, stand for themselves."""
    return [[v if type(v) is int else id(v) for v in values] for values in contents]


def _insides(network: nn.Module) -> Iterator[Callable[[], Iterable[Any]]]:
    """What gives the contents of all that a call may change, as they are when it is called."""
    seen: set[int] = set()
    for namespace in _namespaces(network):
        if id(namespace) in seen:
            continue
        seen.add(id(namespace))
        yield namespace.values
        for value in list(namespace.values()):
            inside = _inside(value)
            if inside is not None and id(value) not in seen:
                seen.add(id(value))
                yield inside


def _inside(value: Any) -> Callable[[], Iterable[Any]] | None:
    """What gives the contents of an object; None if it is not one that a call would change."""
    kind = type(value)  # and not what a stand-in for something else gives as its class
    if issubclass(kind, Tensor):
        return None if value.is_inference() else lambda: (value._version,)
    # Of these types themselves: others may do much when asked for their values.
    if kind in _MAPPINGS:
        return lambda: value.values() if len(value) <= _MOST else (len(value),)
    if kind in _CONTAINERS:
        return lambda: value if len(value) <= _MOST else (len(value),)
    if kind is CellType:
        return lambda: contents_of(value)
    if kind is np.random.Generator:
        return lambda: (hash(str(value.bit_generator.state)),)
    if issubclass(kind, type | FunctionType | ModuleType):
        return None
    try:
        own = object.__getattribute__(value, "__dict__")  # the object's own ways may do much
    except AttributeError:
        return None
    return own.values if isinstance(own, dict) else None


def _namespaces(network: nn.Module) -> Iterator[Mapping[str, Any]]:
    """The variables that the code of a network can reach."""
    kinds = {kind for module in network.modules() for kind in type(module).__mro__}
    first: list[Mapping[str, Any]] = []
    for kind in filter(_is_of_a_user, kinds):
        file = sys.modules.get(kind.__module__)
        first += [vars(kind)] if file is None else [vars(kind), vars(file)]
    yield from first
    waiting = [value for namespace in first for value in list(namespace.values())]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = type(value)
        if kind is FunctionType and _is_of_a_user(value):
            yield value.__globals__
            cells = {str(number): cell for number, cell in enumerate(value.__closure__ or ())}
            yield cells
            # What a cell holds may change inside, and be a function with cells of its own.
            held = {name: held for name, cell in cells.items() for held in contents_of(cell)}
            yield held
            waiting += held.values()
        elif issubclass(kind, type) and _is_of_a_user(value):
            yield vars(value)
        elif issubclass(kind, ModuleType):
            variables = object.__getattribute__(value, "__dict__")  # a lazy one stays unloaded
            if str(variables.get("__name__")).partition(".")[0] not in _LIBRARIES:
                yield variables


def contents_of(cell: CellType) -> tuple[Any, ...]:
    """What a variable of a closure holds, if anything."""
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def _is_of_a_user(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] not in _LIBRARIES


class _Generators:
    """The generators that Python and NumPy share among all, put where no seed leads by itself."""

    def __init__(self) -> None:
        self._before = random.getstate(), np.random.get_state()  # noqa: NPY002 (of others)
        random.seed()
        np.random.seed()  # noqa: NPY002
        self._untouched = self._states()

    def restore(self) -> bool:
        """Put them back; whether they were used."""
        used = self._untouched != self._states()
        random.setstate(self._before[0])
        np.random.set_state(self._before[1])  # noqa: NPY002
        return used

    @staticmethod
    def _states() -> tuple[Any, ...]:
        return random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
