"""Control a robot with a policy that runs elsewhere: `PolicyClient`, `ChunkBroker`, `OverlappedBroker`.

The names in `__all__` are the public surface. NumPy, msgpack and websockets only: the robot's computer needs no torch.
"""

from rlinf_client.chunks import ChunkBroker, OverlappedBroker
from rlinf_client.client import PolicyClient, ServerError
from rlinf_client.loop import control
from rlinf_client.timing import Timing

__all__ = ["PolicyClient", "ServerError", "ChunkBroker", "OverlappedBroker", "control", "Timing"]
