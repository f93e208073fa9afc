"""How to compute, not what: devices and precision, fast decoding, atomic files, parallel work."""
