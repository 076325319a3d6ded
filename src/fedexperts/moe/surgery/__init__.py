"""Surgery on experts: the experts interface of transformers, and what is installed there."""
