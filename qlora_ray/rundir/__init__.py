"""The run directory: what its files are called, what is in them, and who may begin or go on with one."""
