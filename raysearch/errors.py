"""The errors of the platform, and which of them mean that the question was wrong.

    RaysearchError(Exception)
      SweepError(ValueError)    a sweep that cannot be run as asked
      RecordError(ValueError)   a run folder that cannot be read
      TrialError                a trial, or all of them, failed

The leaves have errors of their own (`trainables.errors`); analysis raises ValueError.
"""


class RaysearchError(Exception):
    """Base of what the platform raises."""


class SweepError(RaysearchError, ValueError):
    """A sweep that cannot be run as asked; found before Ray starts."""


class RecordError(RaysearchError, ValueError):
    """A run folder that is missing, damaged or of another version."""


class TrialError(RaysearchError):
    """A trial failed, or all trials of a sweep did."""
