"""The encoder: a frozen BERT that turns chunks into vectors, fast and provably the same as ``transformers`` does.

``find_encoder`` says what an encoder is, ``Encoder`` loads it and embeds. The BERT family runs through a forward of our
own without padding (``retrotool.encoder.packed``), every other model through ``transformers``.
"""

from retrotool.encoder.batches import Rows as Rows
from retrotool.encoder.devices import find_devices as find_devices
from retrotool.encoder.encoder import Encoder as Encoder
from retrotool.encoder.encoder import cosines as cosines
from retrotool.encoder.encoder_identity import EncoderIdentity as EncoderIdentity
from retrotool.encoder.encoder_identity import find_encoder as find_encoder
from retrotool.encoder.encoder_identity import plain_name as plain_name
