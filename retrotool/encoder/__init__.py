"""The encoder: a frozen BERT that turns chunks into vectors, fast and provably the same as ``transformers`` does.

``find_encoder`` says what an encoder is, ``Encoder`` loads it and embeds. The BERT family runs through a forward of our
own without padding (``retrotool.encoder.packed``), every other model through ``transformers``.
"""

from retrotool.encoder.batches import Rows
from retrotool.encoder.devices import find_devices
from retrotool.encoder.encoder import Encoder, cosines
from retrotool.encoder.encoder_identity import EncoderIdentity, find_encoder, plain_name

__all__ = [
    "Encoder",
    "EncoderIdentity",
    "Rows",
    "cosines",
    "find_devices",
    "find_encoder",
    "plain_name",
]
