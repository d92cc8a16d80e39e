"""Text before it is tokenised: cleaned, filtered, its duplicates and evaluation texts left out.

    recipe   what is to be done (YAML)
    stages   a recipe and inputs as datatrove pipelines: clean -> matches -> clusters -> shards
    executors  run stages on this machine or by Slurm
    job      the whole job, from inputs to a folder of JSONL files and a report of what was left out and why

A document goes through the steps of `texts`, `filters` and `duplicates`; `ledger` keeps count. The inputs are cut into
tasks by their sizes alone, so that the result depends neither on the number of processes nor on who runs them.
"""
