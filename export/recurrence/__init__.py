"""Python loops over time: found in traces at several lengths, and folded to one iteration, for any length."""
