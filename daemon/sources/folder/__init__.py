"""Image files in a folder: found, claimed, labelled, remembered."""
