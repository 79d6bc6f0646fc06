"""Attention under vmap: fast kernels kept, and its layers opened.

Torch has no batching rule for scaled dot-product attention and would run the levels one by one;
here they join the batch, and where sequences are short, a kernel of our own is faster.
``nn.MultiheadAttention`` is one opaque function; here it is its parts, so that its projections can
be pruned like any linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from confprune import ops  # noqa: F401  (registers torch.ops.confprune)

_SHORT = 128  # tokens; torch's kernel is made for more
_MOST_ON_CUDA = 65_535  # of B: some of torch's kernels take no larger grid
_MASKS = (torch.bool, torch.float32)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``, which may be called under ``torch.vmap``.

    Examples
    --------
    >>> import torch
    >>> q = torch.randn(3, 2, 4, 5, 8)
    >>> torch.vmap(attention)(q, q, q).shape
    torch.Size([3, 2, 4, 5, 8])
    """
    settings: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        settings["enable_gqa"] = True
    if query.ndim != 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **settings)
    return _Attention.apply(query, key, value, attn_mask, settings)  # type: ignore


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]
) -> Tensor:
    """Attention over [B, heads, T, D], with the kernel for short sequences where that applies."""
    if query.is_cuda and len(query) > _MOST_ON_CUDA:
        parts = [t.split(_MOST_ON_CUDA) for t in (query, key, value)]
        by_example = mask is not None and mask.ndim == 4 and len(mask) > 1
        masks = mask.split(_MOST_ON_CUDA) if by_example else [mask] * len(parts[0])  # type: ignore[union-attr]
        rows = zip(*parts, masks, strict=True)
        return torch.cat([F.scaled_dot_product_attention(*row, **settings) for row in rows])
    if not _is_short(query, key, value, mask, settings):
        return F.scaled_dot_product_attention(query, key, value, mask, **settings)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf)
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    scale = settings["scale"]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.confprune.short_attention(  # type: ignore[no-any-return]
        query, key, value, mask, scale, settings["is_causal"]
    )


def _is_short(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]
) -> bool:
    """Whether the sequences are short and the settings usual; what torch refuses it still sees."""
    tokens = max(query.shape[-2], key.shape[-2])
    heads = query.shape[:2] + query.shape[3:]
    return (
        tokens <= _SHORT
        and query.numel() > 0
        and query.device.type == "cpu"
        and all(t.dtype == torch.float32 for t in (query, key, value))
        and key.shape == value.shape
        and heads == key.shape[:2] + key.shape[3:]
        and (mask is None or (mask.dtype in _MASKS and not settings["is_causal"]))
        and settings["dropout_p"] == 0
        and "enable_gqa" not in settings
    )


class _Attention(torch.autograd.Function):
    """Attention over [B, heads, T, D], with the rule that folds a vmapped dimension into B."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]
    ) -> Tensor:
        return _attend(query, key, value, mask, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: there is no backward."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        settings: dict[str, Any],
    ) -> tuple[Tensor, int]:
        size = info.batch_size

        def folded(tensor: Tensor, dim: int | None) -> Tensor:
            tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return tensor.flatten(0, 1)

        query, key, value = (
            folded(t, d) for t, d in zip((query, key, value), in_dims[:3], strict=True)
        )
        if mask is not None and in_dims[3] is not None:
            mask = mask.movedim(in_dims[3], 0)
            missing = 5 - mask.ndim  # leading dimensions that broadcast
            mask = mask.reshape(size, *[1] * missing, *mask.shape[1:])
            mask = mask.expand(size, query.shape[0] // size, *mask.shape[2:]).flatten(0, 1)
        elif mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = folded(mask, None)
        outputs = _Attention.apply(query, key, value, mask, settings)  # type: ignore
        return outputs.unflatten(0, (size, -1)), 0


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def multi_head_attention(
    linear: Linear,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """``F.multi_head_attention_forward`` with its products through `linear`.

    Returns NotImplemented for what is rarely asked for (attention weights, learned or zero keys,
    static keys, inputs without a batch); the caller then runs torch's own.
    """
    extras = (bias_k, bias_v, static_k, static_v)
    rare = need_weights or add_zero_attn or any(extra is not None for extra in extras)
    if rare or query.ndim != 3 or (training and dropout_p > 0):
        return NotImplemented
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        inputs = (query, key, value)
        projected = [linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]  # type: ignore[arg-type]
    elif query is key and key is value and in_proj_weight is not None:
        projected = list(linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1))
    else:
        return NotImplemented

    def heads(x: Tensor) -> Tensor:  # [T, B, E] to [B, heads, T, D]
        by_head: Tensor = x.unflatten(-1, (num_heads, -1))
        return by_head.permute(1, 2, 0, 3)

    q, k, v = (heads(x) for x in projected)
    mask = _merged_mask(attn_mask, key_padding_mask, num_heads, q)
    attended = attention(q, k, v, mask).permute(2, 0, 1, 3).flatten(-2)
    return linear(attended, out_proj_weight, out_proj_bias), None


def _merged_mask(
    attn_mask: Tensor | None, padding: Tensor | None, num_heads: int, like: Tensor
) -> Tensor | None:
    """Both masks as one to be added to the scores, [B or 1, heads or 1, T or 1, S]."""
    parts = []
    if attn_mask is not None:
        by_head = attn_mask.ndim == 3
        parts.append(attn_mask.unflatten(0, (-1, num_heads)) if by_head else attn_mask[None, None])
    if padding is not None:
        parts.append(padding[:, None, None, :])
    added = [
        torch.zeros_like(part, dtype=like.dtype).masked_fill(part, -torch.inf)
        if part.dtype == torch.bool
        else part.to(like.dtype)
        for part in parts
    ]
    if len(added) == 2:
        return added[0] + added[1]
    return added[0] if added else None
