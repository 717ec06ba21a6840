"""What the files of a run directory are called: a contract with its readers, people and programs."""

CONFIG = "config.yaml"  # what was asked, resolved
PLAN = "plan.json"  # what was derived
MANIFEST = "manifest.json"  # with which versions, data and base
METRICS = "metrics.jsonl"  # a line per logged step, validation or checkpoint
SUMMARY = "summary.json"  # how it ended
REPORT = "report.html"
SAMPLES = "samples.json"  # answers to held-out prompts at the end
PAIRS = "pairs.json"  # held-out pairs before and after training
SAMPLES_BY_STEP = "samples_by_step.jsonl"  # and at each validation
REJECTED = "rejected.jsonl"  # records that were left out, and why
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"  # of the last step
ADAPTER_BEST = "adapter_best"  # of the best validation
START_FROM = "start_from"  # a copy of the adapter that was gone on from (model.start_from)
LOGS = "logs"
TRIAL_EVENTS = "trials.jsonl"  # of a sweep: all that it knows
TRIALS = "trials"  # of a sweep: a run directory for each trial
SWEEP_REPORT = "sweep.html"
