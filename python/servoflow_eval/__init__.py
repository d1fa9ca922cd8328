"""Closed-loop evaluation of robot policies: environments, episodes, verdicts.

Pure Python. `servoflow_eval.metaworld` needs the simulator's packages (see its docstring) and not the engine.
"""
