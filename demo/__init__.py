"""A small production line to try inspectd on: parts rendered on the spot, good ones and bad ones."""
