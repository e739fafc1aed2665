"""What MLflow runs when it loads a model of ours: a packed file, rebuilt by `trainables`. Nothing is unpickled.

MLflow copies this file beside each registered model ("models from code") and imports it there. Images go in as
`trainables.data` gives them, float32 of shape (images, channels, height, width), normalised; logits come out, of shape
(images, classes).
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np


class PackedNetwork(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """A quantized network in a packed file."""

    def load_context(self, context: Any) -> None:
        """Rebuild the network."""
        from trainables.packed import load_packed

        self.network = load_packed(Path(context.artifacts["network"]))

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:
        """Logits of the images, the same on every machine whose torch rounds alike."""
        import torch

        images = torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.float32))
        with torch.inference_mode():
            logits: np.ndarray = self.network(images.contiguous(memory_format=torch.channels_last)).numpy()
        return logits


mlflow.models.set_model(PackedNetwork())
