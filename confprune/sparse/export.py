"""Pruned networks as ONNX, their zeros left out of the file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from confprune.files import written_whole
from confprune.sparse.compression import decompress

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 1e-2
_INDEX_BYTES = 8  # of a survivor, as the standard has it


def export_onnx(
    model: nn.Module,
    args: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> None:
    """Write a pruned network as ONNX and check that onnxruntime computes the same with it.

    Weights with enough zeros become sparse initialisers: their values and positions. This makes
    the file smaller, not the computation: runtimes unpack them and run the dense network. A
    survivor takes 8 bytes for its position, so float32 weights pay from two thirds of zeros on.

    Parameters
    ----------
    model : torch.nn.Module
        Compressed, or dense with zeros; left as it is.
    args : Tensor or tuple
        Example inputs, as the model is called with.
    path : path
        The file to write, whole or not at all.
    kwargs : mapping, optional
        Example inputs by keyword.
    dynamic_shapes : optional
        Which dimensions may vary, as for ``torch.onnx.export``; by default none.

    Raises
    ------
    ImportError
        Without the packages of ``confprune[onnx]``.
    ValueError
        For a network in bfloat16, which onnxruntime cannot run.
    RuntimeError
        If onnxruntime cannot run the network, or computes something else with it.

    Notes
    -----
    The standard allows any initialiser to be sparse, but its operators declare dense types only:
    ``onnx.checker.check_model`` accepts the file, with ``full_check=True``, which infers types, it
    does not.

    Examples
    --------
    >>> import confprune
    >>> model = nn.Linear(64, 64)
    >>> pruned = confprune.prune_levels(model, [0.9]).prune(model, 0)
    >>> export_onnx(pruned, torch.randn(2, 64), "small.onnx")  # doctest: +SKIP
    """
    onnx, runtime = _packages()
    args = args if isinstance(args, tuple) else (args,)
    kwargs = dict(kwargs or {})
    dense = decompress(model)
    if any(parameter.dtype == torch.bfloat16 for parameter in dense.parameters()):
        raise ValueError("onnxruntime has no kernels for bfloat16: export model.float()")
    with torch.no_grad(), warnings.catch_warnings():
        # Of torch's exporter, about torch's own code.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            dense, args, kwargs=kwargs, dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False
        )
        expected = [leaf for leaf in tree_leaves(dense(*args, **kwargs)) if _is_tensor(leaf)]
    assert program is not None
    network = program.model_proto
    for initializer in list(network.graph.initializer):
        sparse = _sparse_form(onnx, initializer)
        if sparse is not None:
            network.graph.initializer.remove(initializer)
            network.graph.sparse_initializer.append(sparse)
    onnx.checker.check_model(network)
    with written_whole(path) as temporary:
        onnx.save_model(network, temporary)
        _check(runtime, os.fspath(temporary), _inputs(network, args, kwargs), expected)


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs {error.name}: pip install 'confprune[onnx]'"
        ) from error
    return onnx, onnxruntime


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _sparse_form(onnx: Any, initializer: Any) -> Any:
    """An initialiser's values and their positions, or None if that is not smaller."""
    array = onnx.numpy_helper.to_array(initializer)
    if array.ndim < 2 or array.dtype.kind != "f":
        return None
    positions = np.flatnonzero(array)
    if positions.size * (array.itemsize + _INDEX_BYTES) >= array.nbytes:
        return None
    values = onnx.numpy_helper.from_array(array.ravel()[positions], initializer.name)
    indices = onnx.numpy_helper.from_array(positions, f"{initializer.name}.positions")
    return onnx.helper.make_sparse_tensor(values, indices, list(array.shape))


def _inputs(network: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The example inputs under the names that they have in the network."""
    by_name = {name: value for name, value in kwargs.items() if _is_tensor(value)}
    in_order = [leaf for leaf in tree_leaves(args) if _is_tensor(leaf)]
    names = [entry.name for entry in network.graph.input if entry.name not in by_name]
    tensors = by_name | dict(zip(names, in_order, strict=True))
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _check(runtime: Any, path: str, inputs: dict[str, Any], expected: list[Tensor]) -> None:
    try:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = session.run(None, inputs)
    except Exception as error:  # of many kinds, none of them public
        raise RuntimeError(f"onnxruntime cannot run the network: {error}") from error
    for wanted, found in zip(expected, outputs, strict=True):
        difference = (torch.from_numpy(found).double() - wanted.double()).abs().max().item()
        allowed = _TOLERANCE.get(wanted.dtype, _COARSE) * max(1.0, wanted.abs().max().item())
        # Not `>`, which a NaN would pass.
        if not difference <= allowed:
            raise RuntimeError(f"onnxruntime's outputs differ from torch's by {difference:.2e}")
