"""The options of the command line: one table, from which everything that lists options is made."""
