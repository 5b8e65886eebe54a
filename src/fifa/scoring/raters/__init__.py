"""Raters: what grades prompts by the rubric (`fifa.scoring.quality.Rater`)."""
