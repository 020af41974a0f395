"""Where a student's trajectory departs from its teacher's. May import what evaluate may, and nothing else of it.

figures.py      compares two trajectories: pure functions
comparison.py   a student and its teacher, loaded and ready to be compared
report.py       the comparison over many prompts: streamed, resumable, written to disk
files.py        what the report's files may hold
plot.py         the report's plot
"""
