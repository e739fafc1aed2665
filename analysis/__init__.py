"""What was learnt: arithmetic over the records of sweeps. Needs numpy, pandas and pyarrow, and no torch, Ray or MLflow."""
