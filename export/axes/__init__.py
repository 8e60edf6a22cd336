"""What the axes of values run over where a model routes: tokens, choices, experts.

Read off FX nodes, while a trace is made and after, so these files know neither traces nor gates.
"""
