"""FLOPs, bytes and memory of one run, counted."""
