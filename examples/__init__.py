"""Examples of the library, step by step, on the embedded model."""
