"""Kernels written by hand, one file per platform; each is imported only where it is asked for."""
