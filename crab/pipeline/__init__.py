"""Runs the study: parameters, stages, executed notebooks and the report. All other rooms work without this one.

``params`` reads params.yaml, which ``schema`` checks; ``stages`` writes what each DVC stage depends on; ``stage``
executes one notebook; ``report`` makes the pages; ``paths`` says where all files of a profile are. A newcomer adds a
parameter in three places: params.yaml, `schema`, and the notebook's parameters cell (``python -m crab.pipeline
defaults`` fills it in).
"""
