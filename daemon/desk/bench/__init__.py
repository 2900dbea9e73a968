"""How fast is a model on this machine? `inspectd bench`.

`contest` holds rounds and sums them up, `rival` is the parent's end of a contender's process and `contender` the other,
`peer` makes anomalib a contender, `path` measures the whole daemon, `machine` says where the figures come from, `sheet`
shows them.
"""
