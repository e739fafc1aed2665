"""Search on shared weights: one network trained for all widths, its mixtures, and their fine-tuning.

Where to find what:

    the question    supernet, question
    mixtures        mixtures, mixture_loop, evaluators, finetune
"""
