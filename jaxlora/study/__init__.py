"""The study: selection, sweep, comparison, figures and report."""
