"""From text to an indexed dataset.

The job, encoding, output with journal and quarantine, one machine or a Ray cluster..
"""
