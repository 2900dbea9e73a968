"""Image → prediction.

What lives here: anomaly detectors, their training, and the model folders they are kept in. torch lives here
and only here. What may not: files of images, thresholds, messages; a detector knows neither the daemon
nor the calibration.

To add one: CONTRIBUTING.md. `patchcore.py` is the smallest whole example.
"""
