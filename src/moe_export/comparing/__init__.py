"""Two artifacts opened, compared and explained; and mutation tests of the comparison itself."""
