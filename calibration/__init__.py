"""Scores of good parts in, a threshold out.

Here live the order statistic (`quantile`), the record made of it (`calibration`), the file that keeps the
record (`store`) and the measures that compare scores with known labels (`metrics`). Numbers only: no image is
decoded here, no network runs, no configuration is read, and nothing from `daemon`, `detectors` or `config`
is imported.

To add another way of choosing a threshold, give it a module beside `quantile`, a name in
`Calibration.method`, and a new schema version in `store`.
"""
