"""Frames in, verdicts out: the running program and its command line.

    Source ─Frame→ [channel] → Detector ─Prediction→ judge ─Verdict→ [outbox on disk] → MQTT ─acknowledged→ forgotten

What lives here: everything with a thread, a file, a socket or a clock, and the pure functions between them
(`judgement`, `contract`, `overlay`). `build.py` alone names every plug-in.
"""
