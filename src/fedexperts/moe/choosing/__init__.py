"""Choose experts that stand in for a layer."""
