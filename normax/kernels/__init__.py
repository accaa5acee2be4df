"""Kernels written by hand: a file for each backend and way to walk an array."""
