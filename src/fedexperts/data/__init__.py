"""Examples, and how they come to clients."""
