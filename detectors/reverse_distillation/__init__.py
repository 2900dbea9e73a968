"""The family of RD4AD (Deng & Li, CVPR 2022): SK-RD4AD (CVPR workshops 2025), RD++ (CVPR 2023) and GSK-RD4AD.

A frozen teacher describes the image at three scales; a bottleneck compresses the description; a student
reconstructs it from there. It has only ever seen good parts, so what it fails to reconstruct is anomalous.
"""
