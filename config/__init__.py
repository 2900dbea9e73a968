"""What an operator may set.

What lives here: every option with its description, bounds and default (`schema`), the reader that turns one TOML
file into settings or into a list of its faults (`load`), and the sample that shows every option (`inspectd.toml`).
pydantic lives here and only here. What may not: anything that opens a source, a model or a connection; whether
a named folder exists is the daemon's question.

To add an option: write a field with a description in `schema.py`, and the same sentence with its default in
`inspectd.toml`. To add a kind of source: write a class with its own `type` beside `FolderSource`, and add it to
`Source`.
"""
