"""Clusters of several machines."""

import re


def on_premise(text: str) -> str:
    """The configuration for machines of one's own, which `cluster.yaml` holds as comments of their own kind."""
    return "\n".join(re.sub("^#[|] ?", "", line) for line in text.splitlines() if line.startswith("#|"))
