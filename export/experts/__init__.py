"""Mixture-of-experts blocks: recognised in a traced program, and written out in the form that an engine wants."""
