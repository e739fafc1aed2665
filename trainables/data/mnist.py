"""Handwritten digits (MNIST), 28x28 grey, 60000 training and 10000 test images.

Read from torchvision's files, Hugging Face parquet or folders of classes: see `trainables.image_files`.
LeCun, Bottou, Bengio and Haffner 1998, doi:10.1109/5.726791.
"""

from trainables.in_memory import splits_of

CLASSES = 10
INPUT_SHAPE = (1, 28, 28)
MEAN, STD = (0.1307,), (0.3081,)
splits = splits_of("mnist", classes=CLASSES, shape=INPUT_SHAPE, mean=MEAN, std=STD, pad=2)
"""55000 training, 5000 validation and 10000 test images."""
