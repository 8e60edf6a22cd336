"""Libraries whose idioms no trace shows, each in another form that computes the same."""
