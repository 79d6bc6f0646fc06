"""Which tensors of a checkpoint are pruned.

Without the network only names and shapes tell a layer from an embedding or a norm.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import same_bytes
from confprune.checkpoint.source import Checkpoint, open_checkpoint

# Of GPT-NeoX `embed_out` is the last linear layer.
_EMBEDDING = re.compile(r"emb(?!ed_out$)|^wte$|^wpe$|^shared$|relative_attention_bias")
_NORM = re.compile(r"norm|^ln|^bn")


@dataclass(frozen=True)
class Choice:
    """Whether a tensor is pruned, and why not.

    Attributes
    ----------
    tensor : StoredTensor
    kept : str or None
        Why it stays as it is; None if it is pruned.
    """

    tensor: StoredTensor
    kept: str | None = None


def choose(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> tuple[Choice, ...]:
    """Tell which tensors `prune` would prune.

    By default those are the matrices of linear layers and the kernels of convolutions: tensors of
    two or more dimensions named ``weight`` (stacks of experts need not be), unless the module's own
    name is that of an embedding or a norm. A matrix with the same values as an embedding is an
    output layer tied to it, and stays as well.

    Parameters
    ----------
    source : path
        As for `prune`.
    include : sequence of str, optional
        Patterns (``"encoder.*.weight"``) of the names to prune, instead of the default.
    exclude : sequence of str, optional
        Patterns of the names to leave as they are.

    Returns
    -------
    tuple of Choice
        One for each tensor, in the order that breaks ties.

    Raises
    ------
    ValueError
        If a pattern matches nothing, nothing is left to prune, or a tensor to prune is not
        float32, float64, float16 or bfloat16.

    Examples
    --------
    >>> import tempfile, torch
    >>> from confprune import checkpoint
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(
    ...         {"embed.weight": torch.ones(9, 2), "fc.weight": torch.ones(4, 2)},
    ...         f"{folder}/model.safetensors",
    ...     )
    ...     for choice in checkpoint.choose(f"{folder}/model.safetensors"):
    ...         print(choice.tensor.name, choice.kept or "is pruned")
    embed.weight an embedding
    fc.weight is pruned
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    tensors = checkpoint.tensors
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(tensor.name, pattern) for tensor in tensors):
                raise ValueError(f"{argument} {pattern!r} matches no name in {checkpoint.source}")
    choices = tuple(Choice(tensor, _kept(tensor, include, exclude)) for tensor in tensors)
    for tensor in pruned_tensors(choices):
        if tensor.dtype not in PRUNABLE_DTYPES:
            raise ValueError(
                f"tensor {tensor.name!r} is {tensor.dtype}; F32, F64, F16 and BF16 can be pruned: "
                "leave it out with exclude"
            )
    if not include:
        choices = _without_tied(choices)
    if not pruned_tensors(choices):
        raise ValueError(f"{checkpoint.source} has no prunable weights: name some with include")
    if include:
        _warn_of_dense_copies(choices)
    return choices


def pruned_tensors(choices: Iterable[Choice]) -> list[StoredTensor]:
    """The tensors that are pruned."""
    return [choice.tensor for choice in choices if choice.kept is None]


def _kept(
    tensor: StoredTensor, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> str | None:
    if _matches(tensor.name, exclude or ()):
        return "excluded"
    if include:
        return None if _matches(tensor.name, include) else "not included"
    return _kept_by_default(tensor)


def _kept_by_default(tensor: StoredTensor) -> str | None:
    *modules, parameter = tensor.name.split(".")
    # The number of a module in a list is no name; the list's own is.
    own_name = next((name.lower() for name in reversed(modules) if not name.isdigit()), "")
    if not tensor.dtype.startswith(("F", "BF")):
        return "not floating-point"
    if len(tensor.shape) < 2:
        return "a vector"
    if own_name == "experts" and len(tensor.shape) == 3 and "bias" not in parameter:
        return None
    if parameter != "weight":
        return "not named weight"
    if _NORM.search(own_name):
        return "a norm"
    # A kernel may be named so: CLIP's `embeddings.patch_embedding` is a convolution.
    if _EMBEDDING.search(own_name) and len(tensor.shape) == 2:
        return "an embedding"
    return None


def _without_tied(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """An output layer that repeats an embedding stays: loading ties it to the embedding again."""
    embeddings = [choice.tensor for choice in choices if choice.kept == "an embedding"]

    def untied(choice: Choice) -> Choice:
        if choice.kept is None:
            for embedding in embeddings:
                if same_bytes(choice.tensor, embedding):
                    return Choice(choice.tensor, f"tied to {embedding.name}")
        return choice

    return tuple(untied(choice) for choice in choices)


def _warn_of_dense_copies(choices: Sequence[Choice]) -> None:
    kept = [choice.tensor for choice in choices if choice.kept is not None]
    for tensor in pruned_tensors(choices):
        for other in kept:
            if same_bytes(tensor, other):
                warnings.warn(
                    f"{tensor.name} is pruned and {other.name}, which has the same values, is not: "
                    "a network that ties them may load the dense one; include both, or neither",
                    stacklevel=3,
                )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
