"""Attention over short sequences, against softmax written out in double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from machine import INSTRUCTION_SETS, check_on, threads
from torch import Tensor

from confprune.grid.attention import attention

short_attention = torch.ops.confprune.short_attention

SHAPES = [  # examples, heads, queries, keys, width
    (1, 1, 1, 1, 1),
    (2, 3, 7, 5, 4),
    (3, 2, 20, 20, 32),
    (1, 2, 17, 64, 33),
    (2, 1, 33, 16, 48),
    (1, 1, 3, 0, 5),
]


def heads(examples: int, count: int, tokens: int, width: int) -> Tensor:
    """As a projection gives them: [examples, tokens, heads · width], split."""
    return torch.randn(examples, tokens, count, width).transpose(1, 2)


def case(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    examples, count, queries, keys, width = shape
    query = 2 * heads(examples, count, queries, width)
    return query, heads(examples, count, keys, width), heads(examples, count, keys, width)


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    scores = scale * q.double() @ k.double().mT
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v.double()  # all masked: 0


class TestShortAttention:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("causal", [False, True])
    def test_it_is_softmax_attention(self, shape, causal):
        q, k, v = case(shape)
        y = short_attention(q, k, v, None, 0.3, causal)
        expected = reference(q, k, v, None, 0.3, causal)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("broadcast", [(), (0,), (1,), (2,), (3,), (0, 1, 2)], ids=str)
    def test_masks_may_be_broadcast_over_any_dimension(self, shape, broadcast):
        q, k, v = case(shape)
        mask = torch.randn([1 if d in broadcast else size for d, size in enumerate(shape[:4])])
        mask = mask.masked_fill(mask > 1, -torch.inf).expand(shape[:4])
        y = short_attention(q, k, v, mask, 1.0, False)
        expected = reference(q, k, v, mask, 1.0)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)

    def test_a_query_without_a_key_gets_zero_and_nan_stays(self):
        q, k, v = case((1, 2, 4, 5, 8))
        mask = torch.zeros(1, 2, 4, 5)
        mask[:, :, 1] = -torch.inf
        q[0, 0, 2, 3] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)  # NaN
        y = short_attention(q, k, v, mask, 1.0, False)
        assert (y[:, :, 1] == 0).all()
        assert y[0, 0, 2].isnan().all()
        assert y.isnan().sum() == 8

    @pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
    def test_large_scores_do_not_overflow(self, size):
        q, k, v = case((1, 1, 3, 9, 4))
        y = short_attention(q * size, k, v, None, 1.0, False)
        expected = reference(q * size, k, v, None, 1.0)
        torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[:-1])
def test_narrower_instruction_sets_compute_the_same(instruction_set):
    check_on(instruction_set, f"{__file__}::TestShortAttention")


def test_an_example_depends_on_neither_the_others_nor_the_threads():
    q, k, v = case((5, 3, 11, 13, 24))
    mask = torch.randn(5, 1, 11, 13).expand(5, 3, 11, 13)
    y = short_attention(q, k, v, mask, 0.5, False)
    for number in (1, 2, 3):
        with threads(number):
            assert torch.equal(short_attention(q, k, v, mask, 0.5, False), y)
    alone = [
        short_attention(*(t[i : i + 1] for t in (q, k, v, mask)), 0.5, False) for i in range(5)
    ]
    assert torch.equal(torch.cat(alone), y)


def test_inputs_may_have_any_strides():
    q, k, v = case((2, 3, 6, 7, 8))
    mask = torch.randn(2, 3, 6, 7)
    y = short_attention(q, k, v, mask, 0.5, False)
    odd = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, v, mask)]
    assert torch.equal(short_attention(*odd, 0.5, False), y)


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_registered_as_torch_wants_it(masked):
    q, k, v = case((2, 3, 6, 7, 8))
    mask = torch.randn(2, 3, 6, 7) if masked else None
    torch.library.opcheck(short_attention.default, (q, k, v, mask, 0.5, not masked))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.zeros(2, 3, 6)}, ValueError, "short_attention takes"),
        ({1: torch.zeros(2, 3, 7, 9)}, ValueError, "short_attention takes"),
        ({2: torch.zeros(2, 3, 9, 8)}, ValueError, "short_attention takes"),
        ({3: torch.zeros(6, 7)}, ValueError, "mask is"),
        ({3: torch.zeros(2, 3, 6, 7, dtype=torch.bool)}, TypeError, "takes float32"),
        ({0: torch.zeros(2, 3, 6, 8, dtype=torch.float64)}, TypeError, "takes float32"),
    ],
    ids=str,
)
def test_what_it_cannot_take_is_refused(changed, error, message):
    arguments = [*case((2, 3, 6, 7, 8)), None, 0.5, False]
    for at, value in changed.items():
        arguments[at] = value
    with pytest.raises(error, match=message):
        short_attention(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": torch.randn(9, 9) > 0},
        {"attn_mask": torch.randn(2, 1, 1, 9)},
        {"tokens": 0},
        {"tokens": 128},
        {"tokens": 129},
        {"dtype": torch.float64},
        {"dtype": torch.float64, "attn_mask": torch.randn(9, 9, dtype=torch.float64)},
        {"keys": 2, "enable_gqa": True},
        {"attn_mask": torch.zeros(9, 9), "is_causal": True},
    ],
    ids=lambda change: "-".join(change) or "plain",
)
def test_attention_is_that_of_torch(change):
    options = dict(change)
    tokens = options.pop("tokens", 9)
    dtype = options.pop("dtype", torch.float32)
    q = heads(2, 4, tokens, 8).to(dtype)
    k, v = (heads(2, options.get("keys", 4), tokens, 8).to(dtype) for _ in range(2))
    options.pop("keys", None)
    y = torch.vmap(lambda q, k, v: attention(q, k, v, **options))(*(t[None] for t in (q, k, v)))[0]
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.dtype == dtype


def test_what_torch_refuses_is_refused():
    q = heads(2, 4, 9, 8)
    with pytest.raises(RuntimeError):
        attention(q, q[:, :, :, :4], q[:, :, :, :4])
