"""Train a model on one client's batches."""
