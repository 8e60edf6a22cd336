"""Which inputs a comparison runs on: cases, sizes and values, planned before anything runs."""
