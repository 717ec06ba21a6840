"""Sweeps: many qlora_ray.train runs as trials of Ray Tune, a ledger that survives anything, one page at the end."""
