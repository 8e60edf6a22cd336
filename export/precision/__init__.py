"""Half precision: what stays in float32, where casts stand, and how such graphs are run and judged."""
