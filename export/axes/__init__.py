"""What the axes of values run over: tokens, choices, experts, steps (`analysis`, for a whole program).

Read off FX nodes, also while a trace is still being made, so these files import neither traces nor gates.
"""
