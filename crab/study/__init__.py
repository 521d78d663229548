"""The study: everything that is trained is a *cell*, and every table is a comparison of cells.

``cells`` describes what is trained; ``plan`` says what it takes; ``store`` trains, answers and scores what is missing
and keeps it; ``ledger`` gives tidy tables of scores; ``rates`` chooses learning rates; ``compare`` has intervals and
verdicts; ``variants``, ``maps`` and ``strengths`` are the experiments; ``faithfulness`` judges reasons. To show
something else, change a notebook. To try something else, add a field to `cells.Cell` and use it in ``train`` or
``prompts``. A change of ``train`` or of ``crab.samples`` retrains every cell; a change of ``score`` only scores again.
"""
