"""Answers questions about an indexed dataset: its size and documents, whether it is sound, where a text stands in it.

``inspect.py`` counts and shows, ``verify.py`` checks everything (with ``script_counts.py`` and ``contamination.py``)
and reports it (``verify_report.py``), ``find.py`` searches a text, ``count.py`` makes the table of a corpus,
``document_marks.py`` tells whether documents begin with bos and end with eos. They share ``places.py`` (where documents
lie) and ``matching.py`` (is this the dataset's tokenizer).
"""
