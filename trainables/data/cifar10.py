"""Small photographs of ten things (CIFAR-10), 32x32 colour, 50000 training and 10000 test images.

Read from torchvision's files, Hugging Face parquet or folders of classes: see `trainables.image_files`. The files in
`cifar-10-batches-py` are pickles: only torchvision opens them, after it has checked their md5 against its own list.
Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

from trainables.in_memory import splits_of

CLASSES = 10
INPUT_SHAPE = (3, 32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
splits = splits_of("cifar10", classes=CLASSES, shape=INPUT_SHAPE, mean=MEAN, std=STD, pad=4, augment="crop-flip")
"""45000 training, 5000 validation and 10000 test images."""
