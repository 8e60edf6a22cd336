"""A graph to look at: laid out as a picture, beside another, in Netron."""
