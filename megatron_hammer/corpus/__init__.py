"""Text corpora: files of documents, and the programs that read, convert, split, sample and shuffle them."""
