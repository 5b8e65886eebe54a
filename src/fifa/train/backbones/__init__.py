"""Families of diffusion models behind one seam."""
