# %% [markdown]
# # From a trained network to a certified sparse one
#
# Handwritten digits, a small network, and every step between training and a file to deploy. Run it
# cell by cell, or whole: `python benchmarks/paper/walkthrough.py` writes to the folder walkthrough.

# %%
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import confprune
from confprune import checkpoint, criteria

OUT = Path("walkthrough")
OUT.mkdir(exist_ok=True)

# %% [markdown]
# ## Three sets of data
# One to train on, one to calibrate on, and one to see whether the promise is kept. The promise is
# about data like the calibration set, so the network must not have seen that.

# %%
digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
images = torch.tensor(digits.images / 16, dtype=torch.float32)[order]
labels = torch.tensor(digits.target)[order]
training, calibration, test = slice(0, 700), slice(700, 1300), slice(1300, None)

# %% [markdown]
# ## A network
# The L1 penalty makes many small weights: those are what pruning takes. An observer follows the
# weights in the last steps, for a criterion that weighs them by how much they still move.

# %%
torch.manual_seed(0)
model = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)


def step() -> None:
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    loss = nn.functional.cross_entropy(model(images[training]), labels[training])
    optimizer.zero_grad()
    (loss + 2e-4 * weights.abs().sum()).backward()
    optimizer.step()


for _ in range(150):
    step()
with criteria.WeightObserver(model, optimizer) as observer:
    for _ in range(50):
        step()
model.eval()
accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
print(f"accuracy of the full network: {accuracy:.3f}")

# %% [markdown]
# ## What pruning does
# One byte a weight holds the masks of a hundred sparsities, and one pass over the data gives the
# loss of every image at every one of them: here, whether the pruned network answers otherwise.

# %%
levels = confprune.prune_levels(model, [j / 100 for j in range(100)])
losses = confprune.loss_matrix(model, images[calibration], levels, "disagreement")
figure = Figure(figsize=(6, 3.5), layout="constrained")
axes = figure.subplots()
axes.plot(levels.sparsities, losses.mean(0))
axes.set(xlabel="sparsity", ylabel="disagreement with the full network")
figure.savefig(OUT / "curve.png")

# %% [markdown]
# ## A certificate
# The curve is of these images. What may be said of new ones? With probability 0.9 over the draw of
# the calibration set, that at most 5 % of them get another answer: up to the certified sparsity.

# %%
promise = {"loss": "disagreement", "alpha": 0.05, "delta": 0.1}
certificate = confprune.calibrate(model, images[calibration], looks=None, **promise)
print(certificate)
test_losses = confprune.loss_matrix(model, images[test], levels, "disagreement")
certificate.plot(OUT / "risk.png", test_risks=test_losses.mean(0).tolist())

# %% [markdown]
# ## No digit left behind
# The promise above is about the average. Keeping it for every digit costs sparsity.

# %%
by_digit = confprune.calibrate(
    model,
    (images[calibration], labels[calibration]),
    groups="targets",
    **promise | {"alpha": 0.1},
)
print(f"{certificate.sparsity:.0%} on average, {by_digit.sparsity:.0%} for every digit")

# %% [markdown]
# ## Other criteria
# Magnitude is one way to choose weights. Several may compete for one certificate: a part of the
# data orders them, the rest tests. Wanda needs input norms, which come from yet another part.

# %%
best = confprune.calibrate(
    model,
    images[calibration],
    criterion=["magnitude", "magnitude_uncertainty", "lamp", "erdos_renyi_kernel", "wanda"],
    statistics={"deviation": observer.deviations()},
    **promise,
)
print(f"{best.sparsity:.0%} with {best.pruning.criterion}")

# %% [markdown]
# ## A file to deploy
# The pruned network is a new one; the certificate can be checked by whoever has both and the data.

# %%
sparse = certificate.prune(model)
certificate.verify(model, images[calibration])
changed = (sparse(images[test]).argmax(1) != model(images[test]).argmax(1)).float().mean()
print(f"other answers on the test images: {changed:.3f}, promised at most {certificate.alpha}")
certificate.save(OUT / "certificate.json")
checkpoint.save(sparse, OUT / "pruned.safetensors", certificate)
compressed = confprune.sparse.compress(sparse)
confprune.sparse.save_sparse(compressed, OUT / "compressed.safetensors", certificate=certificate)
