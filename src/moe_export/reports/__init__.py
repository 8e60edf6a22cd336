"""The report of an export, as one HTML page."""
