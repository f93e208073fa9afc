"""How, not what: devices and precision, fast decoding, files that are written whole."""
