"""The formats that HT is compared with: tensor trains, tensor rings and block terms, behind the same interface."""

from htcompress.formats.format import Format
from htcompress.formats.network_matrix import NetworkMatrix
from htcompress.formats.structure import BlockTerm, Ring, Structure

__all__ = ["BlockTerm", "Format", "NetworkMatrix", "Ring", "Structure"]
