"""The collection meets the training: extraction, units of work, phases.

Imports data, representations, autoencoders, loras, training and analysis.
"""
