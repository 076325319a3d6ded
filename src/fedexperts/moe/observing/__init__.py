"""Observe what runs: routing, attention received, activations, gradients."""
