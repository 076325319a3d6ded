"""Run experiments: join the parts, check, compare, export."""
