"""What a model takes under a federated method, and what of it fits in a memory, without its weights."""
