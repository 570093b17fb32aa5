"""Sample inputs, error cases, costs and baselines, one file per family."""
