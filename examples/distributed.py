"""One certificate made by several processes, and a sharded network pruned to it.

torchrun --nproc-per-node 2 examples/distributed.py
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import confprune


def main() -> None:
    """Calibrate together, then prune a network of which each rank holds a part."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
    data = torch.randn(2000, 64)

    # Every rank has the network, the data and the same settings, and evaluates its share.
    certificate = confprune.calibrate(
        model,
        data,
        loss="disagreement",
        alpha=0.1,
        delta=0.1,
        progress=False,
        group=dist.group.WORLD,
    )
    if dist.get_rank() == 0:
        print(certificate)

    # A network may also be split over the ranks: its mesh is found, and its masks are split alike.
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
    levels = confprune.prune_levels(sharded, [certificate.sparsity])
    with torch.no_grad():
        for name, parameter in sharded.named_parameters():
            if name in levels.levels:
                parameter.masked_fill_(~levels.mask(name, 0), 0)

    whole = dict(certificate.prune(model).named_parameters())
    for name, parameter in sharded.named_parameters():
        assert torch.equal(parameter.full_tensor(), whole[name])


if __name__ == "__main__":
    if torch.cuda.is_available():
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
