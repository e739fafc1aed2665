"""What to try next, and when to stop: the space, proposals, and early stopping.

Where to find what:

    the space         space, networks, bit_layout, layer_sums
    proposals         proposals, choice, frontier, loss_model, loss_formula, staircase, repair, samplers, ledger, twin
    early stopping    stopping, rungs
"""
