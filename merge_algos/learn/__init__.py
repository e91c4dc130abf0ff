"""Training merge coefficients: which scalar scales what, the model with adapters attached, objectives, and the loop.

Nothing here loads a model or reads data: both are given.
"""
