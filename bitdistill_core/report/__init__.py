"""The report of a run: numbers, plots, one HTML page and its Markdown twin.

Reads stage directories, changes nothing in them, and knows nothing about how they were made.
"""
