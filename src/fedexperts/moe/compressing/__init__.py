"""Compress experts: budgets, clusters, merging, quantisation."""
