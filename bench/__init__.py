"""Is CLaSp faster, and faster than what? The paper's table and figures on your machine and model.

    __main__.py     python -m bench: arguments, and which of the three below to make
    prompts.py      questions: our own (prompts.json), or those of Spec-Bench
    target.py       the model that is measured, and CLaSp's settings on it
    methods.py      what is compared: each method is a drafter on the one loop
    search.py       Self-SD's and SWIFT's searches for layers to skip
    fixed.py        the best set that never changes, and what any set gets accepted
    race.py         decoding by all methods in turn
    results.py      the file that keeps what was measured
    table.py        1. the table: a summary of the results in Markdown and as CSV
    steps.py        2. --speed: what each step of a cycle costs
    experiments.py  3. --figures: what is measured for them
    figures.py      and how they are drawn
"""
