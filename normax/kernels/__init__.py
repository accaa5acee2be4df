"""Kernels, and the three tools that place them in a JAX program.

`dispatch` picks a function by platform, `linear` gives a linear function a transpose written by
hand, `sharding` keeps a batch sharded. None of the three knows what is normalized.
"""
