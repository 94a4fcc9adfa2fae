"""The stages of a conversion, one module each.

Every module has a dataclass `Inputs` of stage directories and `run(config, inputs, *, out_dir, work_dir, report,
device) -> Metrics`, which writes only below out_dir (and, to resume, work_dir). See pipeline.py for how they connect.
"""
