"""How fast is a model on this machine? `inspectd bench`.

`command` reads options, `event` has all measured, `sheet` shows it. `contest` holds rounds and sums them up; `rival` is
the parent's end of a contender's process and `contender` the other, and `peer` makes anomalib one. `path` measures the
whole daemon, `flames` draws where time goes, `machine` says where the figures come from.
"""
