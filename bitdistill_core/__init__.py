"""BitNet Distillation: full-precision decoder LM in, task-specific ternary student out.

The library knows the science and nothing else. `__version__` is part of every stage's fingerprint: raise it when a
change alters what a stage writes, and finished stages run again.
"""

__version__ = "0.1.0"
