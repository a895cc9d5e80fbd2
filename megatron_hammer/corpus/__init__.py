"""Raw text: readers, reformatting, sampling, splitting, shuffling, and the sample corpus of the quick start."""
