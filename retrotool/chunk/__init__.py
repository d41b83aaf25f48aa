"""Cut documents into chunks. Defaults: tokens per chunk, and chunks after which a part is closed."""

CHUNK_LENGTH = 64
PART_SIZE = 1 << 20
