"""Mixture-of-experts blocks: recognised in a traced program, outlined, and expanded as an engine wants them."""
