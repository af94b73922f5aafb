"""What is kept and shown: the run directory, tables, W&B."""
