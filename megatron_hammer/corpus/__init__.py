"""Raw text: the strict reader that everything uses, and the sample corpus of the quick start."""
