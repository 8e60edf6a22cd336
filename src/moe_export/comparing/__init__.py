"""Two sides held against one another: found, compared, explained; and whether that can fail."""
