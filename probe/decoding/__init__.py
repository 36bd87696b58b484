"""Decoding policies: pure functions that the loop is given. One small file each."""
