"""Runs as HTML pages for people: one run, or several beside each other. Imports no torch, no ray."""

from qlora_ray.report.charts import smooth
from qlora_ray.report.door import main
from qlora_ray.report.page import key_figures, render_report, write_report
from qlora_ray.rundir.record import RunRecord, read_run

__all__ = ["RunRecord", "key_figures", "main", "read_run", "render_report", "smooth", "write_report"]
