"""The encoder: a frozen BERT that turns chunks into vectors equal to those of ``transformers``, but faster.

``find_encoder`` describes an encoder; ``Encoder`` loads it, with ``encoder.packed`` or ``transformers``.
"""

from retrotool.encoder.devices import find_devices
from retrotool.encoder.encoder import Encoder, Rows, cosines
from retrotool.encoder.encoder_identity import EncoderIdentity, default_name, find_encoder

__all__ = ["Encoder", "EncoderIdentity", "Rows", "cosines", "default_name", "find_devices", "find_encoder"]
