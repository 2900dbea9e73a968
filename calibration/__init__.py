"""Scores of good parts in, a threshold out.

Here live the order statistics (`quantile`) and the fitted tail (`tail`), the choice between them (`threshold`), the
record made of it (`calibration`), the file that keeps the record (`store`), the watch over what comes after (`drift`),
and the measures that compare scores with known labels (`metrics`). Numbers only: no image is decoded here, no network
runs, no configuration is read, and nothing from `daemon`, `detectors` or `config` is imported.

To add another way of choosing a threshold, name it in `threshold.Method`, compute it in `choose`, say in
`calibration.promise` what it promises, and run `python -m tests.bench.thresholds` to see whether that is kept.
"""
