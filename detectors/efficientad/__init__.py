"""EfficientAD S and M (Batzner et al., WACV 2024, arXiv 2303.14535) and PUAD (Sugawara & Imamura, ICIP 2024).

A small frozen teacher describes each patch of 33×33 pixels. A student has learned to say the same of good parts alone,
so they disagree about a dent; an autoencoder has learned how whole good parts look, so it and the student disagree
about what is sound in itself but missing or misplaced. PUAD adds a distance of the picture's mean feature.
"""
