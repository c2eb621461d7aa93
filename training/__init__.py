"""Tensors in, predictions out: networks trained as stacks, kernels, principal components, splits.

Imports nothing of ours.
"""
