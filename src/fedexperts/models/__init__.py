"""Load models, adapt them, and build tiny ones for tests."""
