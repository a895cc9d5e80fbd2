"""What all other packages use and what knows none of them: errors, files, processes, the terminal, the system.

Files: ``files.py`` writes them so that a crash leaves no half of one, ``reading.py`` opens them with distrust,
``locks.py`` holds one, ``mapping.py`` and ``pages.py`` are for memory, ``paths.py`` says what a wrong path means,
``shipped.py`` and ``compiled.py`` find our own. Programs: ``errors.py``, ``cli.py``, ``signals.py``, ``streams.py``,
``processes.py``, ``environment.py``, ``system.py``, ``versions.py``, ``faults.py`` (for tests). For people:
``progress.py``, ``terminal.py``, ``line_input.py``, ``language.py``, ``characters.py``, ``tables.py``, ``pictures.py``,
``html_page.py``.
"""
