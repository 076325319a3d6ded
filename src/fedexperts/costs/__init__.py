"""Predict bytes and memory of a round before it is run."""
