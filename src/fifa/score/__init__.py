"""SCORE: what every pair and every prompt is worth."""
