"""The CPU engine: runs a packed student without PyTorch. `bitdistill_core.engine.model.Engine` is the way in.

Not for training, and not for the file format: that is `bitdistill_core.packing`, which this package reads.
"""
