"""Stands for `torch.nn`, as far as confprune has something faster."""
