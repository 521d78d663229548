"""The study: everything that is trained is a *cell*, and every table is a comparison of cells.

``build`` and ``encode`` prepare data; ``cells`` describes what is trained; ``store`` trains, answers and scores what is
missing and keeps it; ``ledger`` gives tidy tables of scores; ``rates`` chooses learning rates; ``compare`` has
intervals and verdicts; ``variants`` and ``maps`` are the experiments. To show something else, change a notebook. To try
something else, add a field to `cells.Cell` and use it in ``train`` or ``prompts``. A change of ``train`` or ``samples``
retrains every cell; a change of ``score`` only scores again.
"""
