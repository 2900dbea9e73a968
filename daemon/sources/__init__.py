"""Where frames come from.

What lives here: one module for each kind of source, which hands over every part once and lets go of it when its
verdict is safe. What may not: decisions about parts, and anything that knows who takes the frames.

To add one: write `NAME.py` with a class that satisfies `base.Source`, and name it in `daemon/build.py`.
"""
