"""Does a layout train the model that one process would train? Shown on local processes, for any run config.

Nothing is imported here: `shrink` must be usable before torch is.
"""
