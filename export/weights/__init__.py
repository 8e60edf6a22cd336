"""Weights that never fill the memory: where each is stored, what is done to it, and how it is written."""
