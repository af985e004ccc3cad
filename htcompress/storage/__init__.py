"""How the numbers of cores are stored: codecs, and what they take."""

from htcompress.storage.codec import Codec, Plain
from htcompress.storage.registry import CODECS, codec_of, codec_within

__all__ = ["CODECS", "Codec", "Plain", "codec_of", "codec_within"]
