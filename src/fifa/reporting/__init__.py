"""REPORT: one self-contained page a run."""
