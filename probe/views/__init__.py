"""Views of a trace: terminal, plots, HTML."""
