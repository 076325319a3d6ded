"""Load examples, partition them over clients, and batch them."""
