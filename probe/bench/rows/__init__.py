"""The measurements, one file per family. Each has `run(bench)`, which gives the lines of its rows."""
