"""How close a student comes to its teacher.

trajectory.py          the two trajectories compared, as pure functions
trajectory_report.py   the same over many prompts: streamed, resumed, written down
trajectory_plot.py     its picture
"""
