"""What fits where, and how long it takes: the planner, pure arithmetic, and the placement that carries a plan out.

Read `placement` first, then `model_cost`, then `plan`.
"""
