"""Stands for `torch.nn.utils`, as far as confprune has something faster."""
