"""FiFA: filter human feedback data for aligning text-to-image models."""

__version__ = "0.1.0"
