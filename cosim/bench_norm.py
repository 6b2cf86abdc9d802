"""Bench of the norm unit: a vector memory around it, cases of every kind, and the Verilated run under cocotb.

`cases` and `expected` serve both tests/test_norm.py (Amaranth's simulator) and the coroutines marked ``cocotb.test``,
which run inside Verilator by ``run_bench``.
"""
