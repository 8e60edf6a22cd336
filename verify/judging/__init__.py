"""Whether two outputs are equal: margins, routings, ties, a float64 run where the two differ."""
