"""One file per op; importing one registers it."""
