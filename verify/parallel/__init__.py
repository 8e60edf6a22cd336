"""Ranks as processes, compared with the whole model."""
