"""Models that do not fit into memory: verified block by block, planned without their weights."""
