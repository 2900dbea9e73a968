"""What `inspectd check` and `inspectd doctor` look at, a module for each thing that can be wrong."""
