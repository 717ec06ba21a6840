"""The driver's side of a run: it starts the workers, listens to them, and closes the run directory."""
