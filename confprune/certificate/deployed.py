"""Whether a pruned network, compressed or not, can be the one that a certificate is about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import confprune
from confprune.certificate.fingerprint import difference
from confprune.parameters import named_modules
from confprune.sparse.modules import SparseLayer

if TYPE_CHECKING:
    from confprune.certificate import Certificate


def _deployed_weight(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    """A parameter of a network, dense where a sparse layer holds it; None if there is none."""
    path, _, leaf = name.rpartition(".")
    owner = modules.get(path)
    if isinstance(owner, SparseLayer) and leaf == "weight":
        return owner.weight
    return None if owner is None else owner._parameters.get(leaf)


def check_certificate(certificate: object) -> None:
    """Raise TypeError for what is no certificate, such as the path of one."""
    if not isinstance(certificate, confprune.Certificate):
        raise TypeError(
            f"certificate must be a confprune.Certificate, got {type(certificate).__name__}: read "
            "a file with confprune.Certificate.load"
        )


def check_deployed(
    certificate: Certificate, model: nn.Module, pruned: nn.Module | None = None
) -> None:
    """Refuse a network that cannot be the certified one.

    Parameters
    ----------
    certificate : Certificate
        One made from a bare loss matrix knows no network, and fits any.
    model : Module
        The pruned network, compressed or not.
    pruned : Module, optional
        The network that ``certificate.prune`` gives: then every weight is compared, else names,
        shapes, types and numbers of zeros, because a certificate holds no pruned weights.

    Raises
    ------
    TypeError
        If `certificate` is none, but the path of one, say.
    ValueError
        If the network is another one, naming the difference.

    Examples
    --------
    >>> import confprune
    >>> model, data = nn.Linear(64, 64), torch.randn(500, 64)
    >>> certificate = confprune.calibrate(
    ...     model, data, loss="cosine", alpha=0.1, delta=0.1, progress=False
    ... )
    >>> small = confprune.sparse.compress(certificate.prune(model), kernel="sparse", min_sparsity=0)
    >>> check_deployed(certificate, small, certificate.prune(model))
    """
    check_certificate(certificate)
    differs = None if certificate.pruning is None else _difference(certificate, model, pruned)
    if differs is not None:
        raise ValueError(f"the certificate is for another network: {differs}")


def _difference(certificate: Certificate, model: nn.Module, pruned: nn.Module | None) -> str | None:
    pruning = certificate.pruning
    assert pruning is not None
    found, zeros = {}, {}
    modules = named_modules(model)
    others = {} if pruned is None else named_modules(pruned)
    for name, expected in pruning.fingerprint.items():
        weight = _deployed_weight(modules, name)
        if weight is None:
            continue
        dtype = str(weight.dtype).removeprefix("torch.")
        # The hash is of the weights before pruning, which nothing here has.
        found[name] = {**expected, "shape": list(weight.shape), "dtype": dtype}
        zeros[name] = weight.numel() - int(torch.count_nonzero(weight.detach()))
        own = _deployed_weight(others, name)
        if own is not None and found[name] == expected and not torch.equal(weight, own):
            return f"the values of parameter {name!r} are others"
    differs = difference(pruning.fingerprint, found)
    if differs is not None:
        return differs
    return _too_few_zeros(certificate, zeros)


def _too_few_zeros(certificate: Certificate, zeros: Mapping[str, int]) -> str | None:
    pruning = certificate.pruning
    assert pruning is not None
    shapes = {name: entry["shape"] for name, entry in pruning.fingerprint.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    # Each output's weights that compete alone, or each block, may round down.
    alone = pruning.scope == "row" or pruning.pattern is not None
    spared = sum(max(shape[:2]) for shape in shapes.values()) / 2 if alone else 0.0
    if pruning.scope != "layer" or alone:
        sizes, zeros = {"": sum(sizes.values())}, {"": sum(zeros.values())}
    for name, size in sizes.items():
        wanted = round(certificate.sparsity * size) - math.ceil(spared)
        if zeros[name] < wanted:
            where = f" of {name!r}" if name else ""
            return f"{zeros[name]:,} of {size:,} weights{where} are zero instead of {wanted:,}"
    return None
