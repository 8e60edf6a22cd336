"""Wrong copies of a right graph, to test whether a comparison fails on them."""
