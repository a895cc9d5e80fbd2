"""Makes one page of HTML of a run, or of two to compare: curves, incidents, texts and settings, read from its files.

``gather.py`` reads the files, ``curves.py`` thins metrics.jsonl, ``charts.py`` chooses what is drawn, ``page.py``
writes the HTML and ``write.py`` the file, once or again and again.
"""
