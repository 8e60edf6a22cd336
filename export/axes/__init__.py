"""What the axes of values run over where a model routes: tokens, choices, experts.

Read off FX nodes, also while a trace is still being made, so these files import neither traces nor gates.
"""
