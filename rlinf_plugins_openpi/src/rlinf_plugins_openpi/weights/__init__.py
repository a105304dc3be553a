"""Pretrained weights of π0 and π0.5: in from everyone's layouts, strictly, and out in openpi's PyTorch layout.

`names` is the one table between our names and published ones (`parts`, outside, says which of them the model holds as
one parameter), `layouts` says where others keep the same tensors, `files` reads tensors, `hub` finds them, `source` is
what the trainer loads from, `saving` writes, `orbax` reads JAX parameters and `convert` is the command. Importing this
leaves torch unloaded.
"""

from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED, published_names
from rlinf_plugins_openpi.weights.saving import save_published
from rlinf_plugins_openpi.weights.source import PublishedWeights

__all__ = ["EMBEDDING", "EMBEDDING_IN_FILES", "UNUSED", "published_names", "PublishedWeights", "save_published"]
