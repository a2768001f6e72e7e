"""What a run says about itself: the metrics log, progress, pictures and the HTML report.

metrics_log.py   `metrics.jsonl`, the source of truth, truncated on a resume
progress.py      what the terminal (or a log file) shows while a run is going
pictures.py      grids of images as PNG
chart.py         line and stacked charts as inline SVG
glossary.py      what every number of the log means, a sentence each
verdict.py       what a run came to, in sentences
findings/        what its numbers say, in plain sentences, and what to try
html.py          one self-contained `report.html` from a run's folder
"""
