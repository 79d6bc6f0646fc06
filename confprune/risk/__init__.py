"""Distribution-free risk control: p-values, multiple testing and what follows from them.

Pure functions on arrays; NumPy and SciPy only. Losses are matrices [n, K] of numbers in [0, 1],
row = example, column = level of the grid.
"""
