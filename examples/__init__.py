"""What the library does, step by step, on the embedded model."""
