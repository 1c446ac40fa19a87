"""Fused kernels for a GPU, optional: everything here rests on Triton, and nothing here imports it.

`fused.available(device)` says whether they can be used; only then import `ops`, the functions.
"""
