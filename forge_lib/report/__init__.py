"""Reads what a run has written about itself, and shows it: report.html, plots, the model card."""
