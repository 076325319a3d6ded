"""The round loop, what carries it, and what it leaves on disk."""
