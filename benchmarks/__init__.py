"""Measurements of what confprune promises; see README.md in this folder."""
