"""Tensors in, predictions out: networks trained as stacks, kernels, splits. Imports nothing of ours."""
