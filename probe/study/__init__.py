"""The study (arXiv 2511.15098): its printed numbers, and tables of finished traces in its layout beside them."""
