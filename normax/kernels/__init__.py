"""Kernels, and the tools that place them in a JAX program.

`dispatch` picks a function by platform, `linear` gives a linear function a transpose written by
hand, `sharding` keeps a batch sharded; `primitive` is what the three are made of. None of them
knows what is normalized.
"""
