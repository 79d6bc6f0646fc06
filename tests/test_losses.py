"""Losses: their values against slow NumPy references, vmap, NaN, and what they refuse."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from confprune import losses
from confprune.losses import BUILT_IN, Loss, Reference, check_shapes, resolve_loss

NAMES = list(BUILT_IN)
SEGMENTATION = ["dice", "iou", "false_negative_rate", "pixel_disagreement"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def make_case(
    name: str, seed: int, dtype: torch.dtype, variant: int, levels: int = 4
) -> tuple[Tensor, Reference]:
    """Outputs [K, B, ...] near those of a full network, and their reference."""
    generator = torch.Generator().manual_seed(seed)
    batch = 5
    shape: tuple[int, ...] = (batch, 6)
    targets = mask = None
    if name in SEGMENTATION:
        shape = [(batch, 4, 3, 5), (batch, 1, 3, 5), (batch, 3, 5)][variant % 3]
        classes = 4 if variant % 3 == 0 else 2
        if variant % 2:
            targets = torch.randint(-1, classes, (batch, 1, 3, 5), generator=generator)
    elif name == "token_disagreement":
        shape = (batch, 7, 6)
        if variant % 2:
            mask = torch.rand(batch, 7, generator=generator) < 0.6
            mask[0] = False
    else:
        targets = torch.randint(0, 6, (batch,), generator=generator)
    full = torch.randn(shape, generator=generator).to(dtype)
    noise = torch.randn(levels, *shape, generator=generator).to(dtype)
    return full + noise, Reference(full, targets, mask)


def classes_of(outputs: np.ndarray) -> np.ndarray:
    """The predicted class of each pixel of one image."""
    if outputs.ndim == 2:
        return (outputs > 0).astype(int)
    if len(outputs) == 1:
        return (outputs[0] > 0).astype(int)
    return outputs.argmax(0)


def slow_overlap(name: str, outputs: np.ndarray, full: np.ndarray, target: np.ndarray | None):
    """A segmentation loss of one image, with sets of pixels."""
    predicted = classes_of(outputs)
    true = classes_of(full) if target is None else target.reshape(predicted.shape)
    pixels = [pixel for pixel in np.ndindex(true.shape) if true[pixel] >= 0]
    if name == "pixel_disagreement":
        return np.mean([predicted[p] != true[p] for p in pixels]) if pixels else 0.0
    binary = outputs.ndim == 2 or len(outputs) == 1
    values = []
    for label in [1] if binary else range(len(outputs)):
        a = {p for p in pixels if predicted[p] == label}
        b = {p for p in pixels if true[p] == label}
        if name == "dice" and a | b:
            values.append(1 - 2 * len(a & b) / (len(a) + len(b)))
        if name == "iou" and a | b:
            values.append(1 - len(a & b) / len(a | b))
        if name == "false_negative_rate" and b:
            values.append(1 - len(a & b) / len(b))
    return np.mean(values) if values else 0.0


def slow_loss(name: str, outputs: np.ndarray, full: np.ndarray, target, mask) -> float:
    """The loss of one example, as its definition reads."""
    if name in SEGMENTATION:
        return slow_overlap(name, outputs, full, target)
    if name == "disagreement":
        return float(outputs.argmax() != full.argmax())
    if name == "error":
        return float(outputs.argmax() != target)
    if name == "harm":
        return float(full.argmax() == target and outputs.argmax() != target)
    if name == "soft_disagreement":
        p, q = (np.exp(x) / np.exp(x).sum() for x in (outputs, full))
        return 0.5 * np.abs(p - q).sum()
    if name == "token_disagreement":
        positions = range(len(full)) if mask is None else np.flatnonzero(mask)
        different = [outputs[t].argmax() != full[t].argmax() for t in positions]
        return float(np.mean(different)) if different else 0.0
    cosine = outputs @ full / np.linalg.norm(outputs) / np.linalg.norm(full)
    return (1 - cosine) / 2


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    variant=st.integers(0, 5),
)
def test_losses_follow_their_definition_and_stay_in_the_unit_interval(name, seed, dtype, variant):
    outputs, reference = make_case(name, seed, dtype, variant)
    values = BUILT_IN[name](outputs[0], reference)
    expected = [
        slow_loss(
            name,
            outputs[0, i].double().numpy(),
            reference.outputs[i].double().numpy(),
            None if reference.targets is None else reference.targets[i].numpy(),
            None if reference.mask is None else reference.mask[i].numpy(),
        )
        for i in range(outputs.shape[1])
    ]
    assert values.shape == (outputs.shape[1],)
    assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_allclose(values.numpy(), expected, atol=2e-6)
    if BUILT_IN[name].binary:
        assert set(values.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_all_levels_at_once_equal_the_loop(name, variant, dtype):
    outputs, reference = make_case(name, 7, dtype, variant)
    outputs[1].flatten(1)[2, 3] = torch.nan
    loss = BUILT_IN[name]
    one_by_one = torch.stack([loss(level, reference) for level in outputs])
    batch_minor = outputs.movedim(1, -1).contiguous().movedim(-1, 1)
    for together in (
        torch.vmap(lambda level: loss(level, reference))(outputs),
        loss(outputs, reference),
        loss(batch_minor, reference),
        loss(outputs[:1], reference),
    ):
        expected = one_by_one[: len(together)]
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert loss.vmappable
    assert loss.broadcasts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_full_network_has_no_loss_against_itself(name, dtype):
    for variant in range(0, 6, 2):
        _, reference = make_case(name, 3, dtype, variant)
        if BUILT_IN[name].needs_targets:
            reference = reference._replace(targets=reference.outputs.argmax(-1))
        assert BUILT_IN[name](reference.outputs, reference).tolist() == [0.0] * 5


@pytest.mark.parametrize("variant", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_in_the_outputs_is_a_nan_loss_of_that_example_only(name, variant):
    outputs, reference = make_case(name, 11, torch.float32, variant)
    clean = BUILT_IN[name](outputs[0], reference)
    broken = outputs[0].clone()
    broken.flatten(1)[3, 2] = torch.nan
    if name == "token_disagreement" and reference.mask is not None:
        reference.mask[3, 0] = True
        clean = BUILT_IN[name](outputs[0], reference)
    together = torch.vmap(lambda level: BUILT_IN[name](level, reference))(broken[None])[0]
    assert together.isnan().tolist() == [False, False, False, True, False]
    keep = [0, 1, 2, 4]
    torch.testing.assert_close(together[keep], clean[keep])


def test_a_full_network_that_gives_nan_agrees_with_nobody():
    for name in NAMES:
        outputs, reference = make_case(name, 5, torch.float32, 0)
        if name == "error":  # compares with labels only
            continue
        spoilt = reference._replace(outputs=torch.full_like(reference.outputs, torch.nan))
        assert BUILT_IN[name](outputs[0], spoilt).isnan().all(), name
        assert BUILT_IN[name](spoilt.outputs, spoilt).isnan().all(), name


def test_nan_at_padding_does_not_matter():
    outputs = torch.zeros(1, 3, 4)
    outputs[0, 2] = torch.nan
    reference = Reference(outputs, mask=torch.tensor([[True, True, False]]))
    assert losses.token_disagreement(outputs, reference).tolist() == [0.0]


def test_a_sequence_without_positions_has_no_loss():
    reference = Reference(torch.eye(4)[None], mask=torch.zeros(1, 4, dtype=torch.bool))
    assert losses.token_disagreement(torch.eye(4).roll(1, 0)[None], reference).tolist() == [0.0]


def test_labels_that_are_no_class_give_nan_even_where_nothing_was_checked():
    scores = torch.eye(3)
    reference = Reference(scores, targets=torch.tensor([0, 3, -1], dtype=torch.int8))
    for name in ("error", "harm"):
        assert BUILT_IN[name](scores, reference).isnan().tolist() == [False, True, True]
    image = torch.zeros(2, 3, 1, 2)
    reference = Reference(image, targets=torch.tensor([[[0, 7]], [[0, 255]]]))
    for name in SEGMENTATION:
        assert BUILT_IN[name](image, reference).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", SEGMENTATION)
def test_empty_against_empty_has_no_loss(name):
    nothing = -torch.ones(2, 1, 3, 3)
    assert BUILT_IN[name](nothing, Reference(nothing)).tolist() == [0.0, 0.0]
    ignored = torch.full((2, 3, 3), -1)
    assert BUILT_IN[name](-nothing, Reference(nothing, targets=ignored)).tolist() == [0.0, 0.0]


def test_binary_masks_may_be_bool_float_or_integer():
    logits = torch.tensor([[[[2.0, -1.0], [1.0, 1.0]]]])
    mask = torch.tensor([[[1, 0], [0, 1]]])
    for targets in (mask, mask.bool(), mask.float(), mask.to(torch.uint8), mask[:, None]):
        reference = Reference(logits, targets=targets)
        check_shapes(losses.iou, logits, reference)
        assert losses.iou(logits, reference).tolist() == pytest.approx([1 / 3])


def test_class_255_counts_where_there_are_as_many_classes():
    scores = torch.nn.functional.one_hot(torch.tensor([[[255, 0]]]), 300).movedim(-1, 1).float()
    reference = Reference(scores, targets=torch.tensor([[[255, 1]]]))
    assert losses.pixel_disagreement(scores, reference).tolist() == [0.5]


def test_volumes_are_segmented_like_images():
    scores = torch.randn(2, 3, 4, 5, 6)
    flat = scores.reshape(2, 3, 4, 30)
    for name in SEGMENTATION:
        other = torch.roll(scores, 1, 1)
        value = BUILT_IN[name](other, Reference(scores))
        assert torch.equal(value, BUILT_IN[name](torch.roll(flat, 1, 1), Reference(flat)))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cosine_does_not_depend_on_the_scale(scale):
    full = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]) * scale
    other = torch.tensor([[3.0, 4.0], [-2.0, 0.0], [0.0, 5.0]]) * scale
    assert losses.cosine(other, Reference(full)).tolist() == pytest.approx([0, 1, 0.5], abs=1e-6)


def test_cosine_of_zero_embeddings():
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert losses.cosine(zero, Reference(zero)).tolist() == [0.0]
    assert losses.cosine(zero, Reference(one)).tolist() == [0.5]
    assert losses.cosine(one * torch.inf, Reference(one)).isnan().all()


def test_losses_are_found_by_name_object_or_callable():
    assert resolve_loss("dice") is losses.dice
    assert resolve_loss(losses.dice) is losses.dice

    def gap(outputs, reference):
        return (outputs - reference.outputs).abs().amax(-1)

    mine = resolve_loss(gap)
    assert (mine.name, mine.binary, mine.vmappable) == ("gap", False, False)
    assert mine(torch.ones(2, 3), Reference(torch.zeros(2, 3))).tolist() == [1.0, 1.0]
    assert resolve_loss(functools.partial(gap)).name == "partial"


def test_built_in_losses_are_named_as_in_the_module_and_explain_themselves():
    for name in NAMES:
        loss = getattr(losses, name)
        assert isinstance(loss, Loss)
        assert loss.name == name
        assert loss.__doc__
        assert "Attributes" not in loss.__doc__
    assert [name for name in NAMES if BUILT_IN[name].binary] == ["disagreement", "error", "harm"]
    assert [name for name in NAMES if BUILT_IN[name].needs_targets] == ["error", "harm"]


def test_unknown_losses_are_refused_with_the_valid_names():
    with pytest.raises(ValueError, match=r"unknown loss 'acuracy': use 'disagreement', 'error'"):
        resolve_loss("acuracy")
    with pytest.raises(TypeError, match="must be a name or a callable, got float"):
        resolve_loss(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_what_a_loss_takes_passes_the_check(name, variant):
    outputs, reference = make_case(name, 2, torch.bfloat16, variant)
    check_shapes(BUILT_IN[name], outputs[0], reference)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "message"),
    [
        (
            "disagreement",
            zeros(8, 128, 384),
            None,
            r"'disagreement' takes class scores \[B, C\] \(C >= 2\), got outputs of shape "
            r"\[8, 128, 384\]: use loss='token_disagreement' or pass forward=",
        ),
        ("disagreement", zeros(8, 3, 4, 4), None, "use loss='pixel_disagreement'"),
        ("soft_disagreement", zeros(8, 1), None, r"two scores per example, such as \[0, logit\]"),
        ("disagreement", zeros(8, 3).long(), None, "floating-point outputs, got torch.int64"),
        ("error", zeros(8, 3), None, "compares with labels and the batch has none"),
        ("error", zeros(8, 3), zeros(8, 1).long(), r"takes labels \[B\], got labels of shape"),
        ("harm", zeros(8, 3), zeros(8), "takes integer labels, got torch.float32"),
        ("error", zeros(8, 3), torch.arange(8), "labels from 0 to 2 .* got the label 3"),
        ("harm", zeros(2, 3), -torch.ones(2).long(), "got the label -1"),
        ("error", zeros(2, 3), ["a", "b"], "labels as one tensor per batch, got list"),
        ("token_disagreement", zeros(8, 3), None, r"\[B, T, V\].* use loss='disagreement'"),
        ("dice", zeros(8, 3), None, "one logit per pixel .* use loss='disagreement'"),
        ("dice", zeros(2), None, "use another loss"),
        (
            "iou",
            zeros(2, 3, 8, 8),
            zeros(2, 4, 4).long(),
            r"takes labels \[2, 8, 8\] or \[2, 1, 8, 8\] .* resize the outputs in forward=",
        ),
        ("iou", zeros(2, 3, 8, 8), zeros(2, 8, 8), "takes integer labels"),
        ("iou", zeros(2, 3, 1, 1), torch.tensor([[[3]], [[0]]]), "got the label 3; a pixel to"),
        ("dice", zeros(1, 1, 1, 2), torch.tensor([[[0, 255]]]), "got the label 255"),
        ("dice", zeros(1, 1, 2), torch.tensor([[[0, 0.5]]]), "got the label 0.5"),
        ("cosine", zeros(8, 5, 16), None, r"takes embeddings \[B, D\].*such as a mean"),
    ],
)
def test_outputs_and_labels_that_do_not_fit_are_refused(name, outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        check_shapes(BUILT_IN[name], outputs, Reference(outputs, targets))


def test_a_mask_of_other_positions_is_refused():
    outputs = zeros(2, 5, 9)
    with pytest.raises(ValueError, match=r"mask \[B, T\], got a mask of shape \[2, 6\]"):
        check_shapes(losses.token_disagreement, outputs, Reference(outputs, mask=zeros(2, 6)))


def test_outputs_must_be_tensors_of_one_shape():
    with pytest.raises(TypeError, match="as one tensor, got tuple: pass forward="):
        check_shapes(losses.disagreement, (zeros(2, 3),), Reference(zeros(2, 3)))
    with pytest.raises(ValueError, match=r"have shape \[2, 4\] and the full network's \[2, 3\]"):
        check_shapes(losses.disagreement, zeros(2, 4), Reference(zeros(2, 3)))


def test_outputs_for_a_callable_are_its_own_affair():
    mine = resolve_loss(lambda outputs, reference: zeros(2))
    check_shapes(mine, {"logits": zeros(2, 3)}, Reference(zeros(2, 3)))
    with pytest.raises(ValueError, match="the batch has none"):
        check_shapes(Loss("mine", mine.function, needs_targets=True), None, Reference(zeros(2, 3)))
