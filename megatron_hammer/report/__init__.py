"""Makes one page of HTML of a run, or of two to compare: curves, incidents, texts and settings, read from its files."""
