"""Where the error is: the first faulty node of a graph that gives wrong results."""
