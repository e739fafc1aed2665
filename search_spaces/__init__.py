"""Search spaces: one a file, `space(layers)` gives Optuna distributions by address.

An address names a field of the trial's configuration: `bits/conv1/weight`, `optimizer/lr`, `method/per_channel`,
`model/width`. `layers` are the quantizable rows of the model's layer table; only `name`, `first` and `last` are read.
A space may also take `config`, the JSON tree of the base configuration, and `layers_of`, a function from values by
address to the layers of that network: where a space changes the network, bits are for the trials that have the layer.
"""
