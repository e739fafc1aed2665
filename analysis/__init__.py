"""What was learnt: arithmetic over the records of sweeps.

Needs numpy, pandas and pyarrow, matplotlib only where it plots, and no torch, Ray or MLflow.
"""
