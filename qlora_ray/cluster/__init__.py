"""The Ray cluster of a run: connecting to it, and what is looked at before a GPU hour is spent."""
