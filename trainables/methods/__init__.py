"""Quantization methods, one a file; the file's name is the method's name.

A file whose name begins with an underscore holds a part of a method.

Where to find what:

    baselines         float, lsq, pact, dorefa
    SAT               sat, _sat_quantizers, _sat_kernels, _sat_as_published
    AdaBits           adabits, _width_lists, _switchable_clip, _norm_sets, _progressive
    Bayesian Bits     bayesian_bits, _gates, _gated_rounding, _gated_norm
    BSQ               bsq, _bit_planes, _binary_digits, _bit_plane_sgd, _bit_report, _dynamic_range, _lean_layers
    Double Rounding   double_rounding, _switched_quantizers, _double_round, _switched_norm, _adaptive_rates,
                      _bit_switching, _stored_codes
    N2UQ              n2uq, _n2uq_modules, _n2uq_places, _n2uq_kernels, _threshold_kernels, _n2uq_exported
"""
