"""What a comparison found, as data, text, an HTML page, and for CI."""
