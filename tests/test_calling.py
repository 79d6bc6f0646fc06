"""How a model is called on a batch, and what its outputs are compared with."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import confprune
from confprune.calling import call, padding_mask_of, targets_of

X = torch.arange(14.0).reshape(7, 2)
Y = torch.arange(7)


def test_labels_are_found_where_they_usually_are():
    assert targets_of({"x": X, "label": Y}) is Y
    assert targets_of({"x": X, "labels": Y, "label": X}) is Y
    assert targets_of({"x": X}) is None
    assert targets_of((X, Y)) is Y
    assert targets_of([X, Y]) is Y
    assert targets_of((X,)) is None
    assert targets_of((X, "text")) is None
    assert targets_of(X) is None


def test_padding_is_what_the_attention_mask_leaves_out():
    mask = torch.tensor([[1, 1, 0]])
    assert padding_mask_of({"attention_mask": mask}).tolist() == [[True, True, False]]
    assert padding_mask_of({"attention_mask": mask[None]}) is None
    assert padding_mask_of({"x": X}) is None
    assert padding_mask_of((X, Y)) is None


class Recorder(nn.Module):
    """Keeps what it was called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.called = (args, kwargs)
        return X


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, Y), (X,), {}),
        ([X, Y], (X,), {}),
        ((X,), (X,), {}),
        (((X, Y), Y), (X, Y), {}),
        ({"x": X, "labels": Y}, (), {"x": X}),
        ({"x": X, "label": Y}, (), {"x": X}),
        (({"x": X, "z": Y}, Y), (), {"x": X, "z": Y}),
    ],
)
def test_the_model_is_called_with_the_inputs_alone(batch, args, kwargs):
    model = Recorder()
    assert call(model, batch, None) is X
    assert all(a is b for a, b in zip(model.called[0], args, strict=True))
    assert model.called[1].keys() == kwargs.keys()
    assert all(value is kwargs[key] for key, value in model.called[1].items())


def test_a_batch_of_three_needs_to_be_told_how():
    with pytest.raises(ValueError, match=r"got 3 values: pass forward=lambda model, batch"):
        call(Recorder(), (X, X, Y), None)
    assert call(Recorder(), (X, X, Y), lambda model, batch: model(batch[0])) is X


def test_the_scores_of_a_hugging_face_output_are_taken():
    forward = lambda model, batch: batch  # noqa: E731
    assert call(Recorder(), {"loss": 1, "logits": X, "last_hidden_state": Y}, forward) is X
    assert call(Recorder(), {"last_hidden_state": X, "pooler_output": Y}, forward) is X
    with pytest.raises(TypeError, match="output is a dict, not a tensor"):
        call(Recorder(), {"hidden": X}, forward)


@pytest.mark.parametrize(
    ("data", "model"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.uint8, torch.float32),
    ],
)
@pytest.mark.parametrize("layer", [nn.Linear(6, 2), nn.Conv1d(3, 2, 3)])
def test_data_of_another_type_than_the_weights_is_named(layer, data, model):
    inputs = torch.ones(50, 6) if isinstance(layer, nn.Linear) else torch.ones(50, 3, 6)
    message = (
        f"the data is {data} and the model's weights are {model}: convert the data, with "
        rf".to\({model}\), or the model, or do so in forward=lambda model, batch: ... \("
    )
    with pytest.raises(TypeError, match=message):
        confprune.calibrate(
            layer.to(model), inputs.to(data), loss="cosine", alpha=0.5, delta=0.1, progress=False
        )


def test_a_model_that_converts_its_inputs_takes_any_type():
    inputs = torch.ones(50, 6)
    half = nn.Linear(6, 2).bfloat16()
    forward = lambda model, batch: model(batch.bfloat16())  # noqa: E731
    assert call(half, inputs, forward).dtype == torch.bfloat16


def test_how_a_model_is_called_is_told_where_it_cannot_be_called_so():
    batch = {"input": torch.ones(30, 6), "name": ["a.png"] * 30}
    message = r"of a batch .* is \(inputs, targets\), .* as keywords; .* pass forward=lambda"
    with pytest.raises(TypeError, match=f"unexpected keyword argument 'name': {message}"):
        call(nn.Linear(6, 2), batch, None)
    with pytest.raises(TypeError, match=f"argument: 'input2': {message}"):
        call(nn.Bilinear(2, 2, 2), (X, X), None)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'x'$"):
        call(nn.Linear(6, 2), batch, lambda model, batch: model(x=1))


def test_other_errors_of_a_model_are_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        call(nn.Linear(6, 2), torch.ones(5, 4), None)
    assert caught.value.__cause__ is None
    with pytest.raises(RuntimeError, match="of this type"):
        call(nn.Linear(2, 2), X, lambda model, batch: raising("none of this type"))


def raising(message: str) -> Tensor:
    raise RuntimeError(message)


@pytest.mark.parametrize("forward", [3, "forward", (len,)])
def test_a_forward_that_cannot_be_called_is_refused_by_name(forward):
    model = nn.Linear(2, 2)
    message = (
        rf"forward must be a callable \(model, batch\) -> outputs, got {re.escape(repr(forward))}"
    )
    certificate = confprune.calibrate(
        model, X, loss="cosine", alpha=0.9, delta=0.9, sparsities=[0.5], progress=False
    )
    for use in (
        lambda: confprune.calibrate(
            model, X, loss="cosine", alpha=0.9, delta=0.9, progress=False, forward=forward
        ),
        lambda: confprune.loss_matrix(
            model, X, confprune.prune_levels(model, [0.5]), "cosine", forward=forward
        ),
        lambda: confprune.input_norms(model, X, forward=forward),
        lambda: certificate.verify(model, X, forward=forward),
    ):
        with pytest.raises(TypeError, match=message):
            use()
