"""A graph a rank: experts placed, rows exchanged, graphs cut where ranks exchange; manifest and picture."""
