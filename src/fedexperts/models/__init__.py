"""Models: where they come from, what of them is adapted, and tiny ones for tests."""
