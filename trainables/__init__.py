"""What can be trained: data sets, models, quantization methods, and the training loop as a generator.

Knows nothing of Ray, Optuna or MLflow. `trainables.fit.fit(config)` yields one report an epoch; whoever iterates
decides what to do with it.
"""
