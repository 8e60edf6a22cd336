"""The command line, a file a command. What is heavy is imported when a command runs."""
