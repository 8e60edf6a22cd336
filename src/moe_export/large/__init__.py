"""Models that do not fit in memory: verified block by block, planned without their weights."""
