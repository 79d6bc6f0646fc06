"""Layers are told from embeddings and norms by name and shape, in the models people have."""

import pytest
import torch
import transformers
from safetensors.torch import save_file

from confprune import checkpoint
from confprune.parameters import prunable_parameters

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
IMAGES = {"image_size": 16, "patch_size": 8}


def fates(source, **patterns):
    return {c.tensor.name: c.kept for c in checkpoint.choose(source, **patterns)}


def pruned(source, **patterns):
    return {name for name, kept in fates(source, **patterns).items() if kept is None}


@pytest.fixture
def file(tmp_path):
    def write(**shapes):
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("0.weight", (3, 2)),
        ("model.layers.0.self_attn.q_proj.weight", (3, 2)),
        ("lm_head.weight", (3, 2)),
        ("embed_out.weight", (3, 2)),
        ("vit.embeddings.patch_embeddings.projection.weight", (3, 2, 2, 2)),
        ("vision_model.embeddings.patch_embedding.weight", (3, 2, 2, 2)),
        ("mixer.conv1d.weight", (3, 1, 2)),
        ("mlp.experts.0.w1.weight", (3, 2)),
        ("mlp.experts.gate_up_proj", (3, 2, 2)),
    ],
)
def test_layers(file, name, shape):
    assert fates(file(**{name: shape})) == {name: None}


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.embed_tokens.weight", (3, 2), "an embedding"),
        ("bert.embeddings.word_embeddings.weight", (3, 2), "an embedding"),
        ("transformer.wte.weight", (3, 2), "an embedding"),
        ("wpe.weight", (3, 2), "an embedding"),
        ("shared.weight", (3, 2), "an embedding"),
        ("point_embed.0.weight", (3, 2), "an embedding"),
        ("decoder.relative_attention_bias.weight", (3, 2), "an embedding"),
        ("vit.embeddings.position_embeddings", (1, 3, 2), "not named weight"),
        ("attn.bias", (1, 1, 3, 3), "not named weight"),
        ("mlp.experts.gate_up_proj_bias", (3, 2, 2), "not named weight"),
        ("final_norm.weight", (3, 2), "a norm"),
        ("LayerNorm.weight", (3, 2, 2), "a norm"),
        ("ln_f.weight", (3, 2), "a norm"),
        ("fc.bias", (3,), "a vector"),
        ("bn1.weight", (3,), "a vector"),
    ],
)
def test_what_is_no_layer_is_kept_for_a_reason(file, name, shape, reason):
    assert fates(file(**{name: shape, "fc.weight": (2, 2)}))[name] == reason


FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=1
        ),
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL)),
    "clip": (
        transformers.CLIPModel,
        transformers.CLIPConfig(
            text_config=SMALL | {"bos_token_id": 0, "eos_token_id": 1},
            vision_config=SMALL | IMAGES,
        ),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_pruned_where_the_model_would_be_and_loads(tmp_path, family):
    kind, config = FAMILIES[family]
    model = kind(config)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }
    # An output layer tied to an embedding is pruned with the model, but not without it.
    expected = set(prunable_parameters(model)) - embeddings
    result = checkpoint.prune(tmp_path / "dense", tmp_path / "sparse", sparsity=0.5, progress=False)
    assert set(result.names) == expected
    loaded = dict(kind.from_pretrained(tmp_path / "sparse").named_parameters())
    zeros = 0
    for name, parameter in model.named_parameters():
        kept = loaded[name] != 0
        assert torch.equal(loaded[name][kept], parameter[kept])
        zeros += int((~kept).sum()) if name in expected else 0
        assert name in expected or torch.equal(loaded[name], parameter)
    assert zeros == result.counts[0] == round(0.5 * result.total)


def test_an_output_layer_that_repeats_an_embedding_is_kept(tmp_path):
    embedding = torch.randn(6, 4)
    path = tmp_path / "model.safetensors"
    tensors = {
        "embed_tokens.weight": embedding,
        "lm_head.weight": embedding.clone(),
        "other_head.weight": embedding + 1e-6,
        "half_head.weight": embedding.half(),
    }
    save_file(tensors, path)
    assert fates(path)["lm_head.weight"] == "tied to embed_tokens.weight"
    assert pruned(path) == {"other_head.weight", "half_head.weight"}
    with pytest.warns(
        UserWarning, match=r"lm_head.weight is pruned and embed_tokens.weight, which"
    ):
        assert pruned(path, include=["lm_head*"]) == {"lm_head.weight"}


def test_patterns_take_the_place_of_the_default(file):
    path = file(**{"embed.weight": (3, 2), "fc.weight": (2, 2), "fc.bias": (2,), "a.w": (5,)})
    assert pruned(path, include=["*embed*", "fc.*"]) == {"embed.weight", "fc.weight", "fc.bias"}
    assert pruned(path, include=["fc.*"], exclude=["*.bias"]) == {"fc.weight"}
    assert fates(path, include=["fc.*"], exclude=["*.bias"]) == {
        "embed.weight": "not included",
        "fc.weight": None,
        "fc.bias": "excluded",
        "a.w": "not included",
    }


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"include": ["kernel"]}, "include 'kernel' matches no name in .*model.safetensors"),
        ({"exclude": ["kernel"]}, "exclude 'kernel' matches no name in .*model.safetensors"),
        ({"exclude": ["fc.*", "fp8.*"]}, "has no prunable weights: name some with include"),
        ({"include": ["steps"]}, "'steps' is I64; F32, F64, F16 and BF16 can be pruned"),
        ({}, "'fp8.weight' is F8_E4M3; .*: leave it out with exclude"),
    ],
)
def test_choices_that_cannot_be_made(tmp_path, patterns, message):
    tensors = {
        "fc.weight": torch.randn(2, 2),
        "fp8.weight": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "steps": torch.arange(4).view(2, 2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        checkpoint.choose(tmp_path / "model.safetensors", **patterns)
