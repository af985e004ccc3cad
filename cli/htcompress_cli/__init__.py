"""The command line of htcompress: a thin shell around the library."""
