"""What can be wrong with what a person asked for, found before anything expensive starts.

ConfigError(ValueError)    a value, an address or a combination of settings
PluginError(ImportError)   an unknown method, model, data set or search space, or one that does not load
DataError(ValueError)      a data set that is missing, corrupt or of another shape than expected
DivergedError(ArithmeticError)  a training whose loss is no longer finite: the trial failed, nothing else did
StorageError(OSError)      storage that has refused to be written for too long
"""


class ConfigError(ValueError):
    """A value, an address or a combination of settings that cannot be used."""


class PluginError(ImportError):
    """An unknown method, model, data set or search space, or one that does not load."""


class DataError(ValueError):
    """A data set that is missing, corrupt or of another shape than expected."""


class DivergedError(ArithmeticError):
    """A training whose loss is no longer finite."""


class StorageError(OSError):
    """Storage that has refused to be written for too long."""
