"""What can be trained: data sets, models, quantization methods, and the training loop as a generator.

Knows nothing of Ray, Optuna or MLflow. `trainables.fit.fit(config)` yields one report an epoch; whoever iterates
decides what to do with it.

Where to find what:

    the question      config, layer_bits, plugin_settings, plugins, build, errors
    data and models   data/, splits, in_memory, image_files, parquet_files, models/
    layers and costs  layers, dataflow, cost, measures, latency
    quantization      methods/, method, quantize, encoding, modules, shared_norm
    training          fit, step, optimizers, teachers, modes, world, start, inherit, checkpoint, storage
    memory layout     layouts, heavy_convolution
    sensitivity       sensitivity, layer_profile, curvature, probed_layers
    shared weights    supernet, prefix
    export            export/, packed
"""
