"""One export as one page."""
