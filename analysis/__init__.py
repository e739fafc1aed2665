"""What was learnt: arithmetic over the records of sweeps.

Needs numpy, pandas and pyarrow, matplotlib only where it plots, and no torch, Ray or MLflow.

Where to find what:

    fronts            rows, pareto, front, pick, tradeoff
    several sweeps    compare, comparison, confidence
    budgets of bits   allocate, integer_program, ladder
    for people        report, page, swept, caveats, plots, sensitivity_plot, wording
"""
